"""The report: one self-contained page about a search or a fit, from the files in its folder."""

from __future__ import annotations

from pathlib import Path

from lightning_prune.files import write_text
from lightning_prune.report.fit import add_fit
from lightning_prune.report.folder import RunFolder
from lightning_prune.report.page import Page
from lightning_prune.report.search import add_search
from lightning_prune.report.shared import add_configuration, add_kernels, add_sensitivity

__all__ = ["report"]


def report(run_dir: str | Path, output: str | Path | None = None) -> Path:
    """Write a page about what a fit or a search left in its folder.

    The page needs nothing but itself: no network, no script, no database; figures are drawn into it. What is not in
    the folder is left out: `search_result.json`, `trials.json`, TensorBoard's event files, sensitivities, the kernel
    report, the configuration. Files are read as text or numbers, nothing is unpickled.

    Args:
        run_dir: folder of a run, such as `runs/digits/version_0`.
        output: of the page; `report.html` in that folder by default.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: there is no such folder, or nothing in it to report.
        ValueError: a file in it is damaged, or of another version.
        OSError: the page cannot be written.
    """
    run = RunFolder.read(run_dir)
    search = run.result is not None or run.history is not None
    page = Page(f"{'Search' if search else 'Fit'}: {run.name}")
    if search:
        add_search(page, run)
    add_fit(page, run, dense=search)
    add_kernels(page, run)
    add_sensitivity(page, run)
    add_configuration(page, run)
    path = run.path / "report.html" if output is None else Path(output)
    write_text(path, page.html())
    return path
