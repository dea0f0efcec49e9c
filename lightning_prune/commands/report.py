"""`lightning-prune report`: one page about a search or a fit."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lightning_prune.report import report
from lightning_prune.terminal import console, say

_DESCRIPTION = """\
Write one page about a finished fit or search: what came of it, its curves, its trials, its layers.

  lightning-prune report runs/digits_agp/version_0
  lightning-prune report runs/digits_search/version_0 --output digits.html

The page is a single file that needs neither a network nor a script, and no model or data is loaded to write it."""

_LOOKED_FOR = """\
It shows what it finds in RUN_DIR: search_result.json and trials.json of a search, TensorBoard's event files, recovery/
(fine-tuning of a search's winner), sensitivity.json, kernel_report.json, config.yaml and recipe.yaml."""


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Args:
        arguments: after the word `report`.

    Raises:
        SystemExit: with code 2 for options that do not parse, 0 after --help.
        FileNotFoundError: there is nothing to report.
        ValueError: a file is damaged.
    """
    parser = argparse.ArgumentParser(
        "lightning-prune report",
        description=_DESCRIPTION,
        epilog=_LOOKED_FOR,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="folder of the run, such as runs/NAME/version_0")
    parser.add_argument("--output", metavar="FILE", help="the page to write (default: report.html in RUN_DIR)")
    given = parser.parse_args(list(arguments))
    path = report(given.run_dir, given.output)
    say(console(), f"written: {path}")
