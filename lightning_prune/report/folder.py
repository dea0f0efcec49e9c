"""What there is to report in the folder of a run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_prune.report.events import Events, read_events
from lightning_prune.search.curves import Sensitivity
from lightning_prune.search.history import History, load_trials
from lightning_prune.search.result import SearchResult

_RESULT, _TRIALS, _EVENTS = "search_result.json", "trials.json", "events.out.tfevents.*"
_SENSITIVITY = ("sensitivity.json", "sensitivity/sensitivity.json")
_KERNELS = ("kernel_report.json", "latency/kernel_report.json")
_LOOKED_FOR = (_RESULT, _TRIALS, _EVENTS, *_SENSITIVITY, *_KERNELS)


@dataclass(frozen=True)
class RunFolder:
    """What was found.

    Args:
        path: of the folder.
        result: of a search.
        history: its trials.
        events: curves of the run, which for a search is the training of the dense network.
        recovery: those of the winner's fine-tuning.
        sensitivity: of each layer.
        kernels: the content of a kernel report.
        command: that made it, without passwords.
        files: name -> text of the configurations, without passwords.
    """

    path: Path
    result: SearchResult | None
    history: History | None
    events: Events
    recovery: Events
    sensitivity: Sensitivity | None
    kernels: Mapping[str, Any] | None
    command: str | None
    files: Mapping[str, str]

    @property
    def name(self) -> str:
        """Its last folders, which say which run it is."""
        return "/".join(self.path.resolve().parts[-3:]).lstrip("/")

    @classmethod
    def read(cls, path: str | Path) -> RunFolder:
        """Look for everything that a report can show.

        Raises:
            FileNotFoundError: there is no such folder, or nothing in it.
            ValueError: a file is damaged.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"there is no folder {str(path)!r}; give that of a run, such as runs/NAME/version_0"
            )
        sensitivity, kernels = _first(folder, _SENSITIVITY), _first(folder, _KERNELS)
        events = read_events(folder)
        found = (_first(folder, (_RESULT,)), _first(folder, (_TRIALS,)), sensitivity, kernels)
        if not any(found) and not events:
            raise FileNotFoundError(_nothing(folder))
        files = {
            each.name: _without_passwords(each.read_text(encoding="utf-8", errors="replace"))
            for each in (*sorted(folder.glob("config*.yaml")), folder / "recipe.yaml", folder / "plan.yaml")
            if each.is_file()
        }
        command = re.search(r"^# command: (.+)$", files.get("recipe.yaml", ""), re.MULTILINE)
        result = None if found[0] is None else SearchResult.load(found[0])
        recovery = "recovery" if result is None else result.details.get("recovery", {}).get("folder", "recovery")
        return cls(
            folder,
            result,
            None if found[1] is None else load_trials(found[1]),
            events,
            read_events(folder / recovery),
            None if sensitivity is None else Sensitivity.load(sensitivity),
            None if kernels is None else _kernels(kernels),
            None if command is None else command.group(1),
            files,
        )


def _first(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _nothing(folder: Path) -> str:
    """Says what was looked for, and where there is more."""
    names = [n for n in _LOOKED_FOR if n != _EVENTS]
    inside = [
        child.name
        for child in sorted(folder.iterdir())
        if child.is_dir() and (_first(child, tuple(names)) is not None or any(child.glob(_EVENTS)))
    ]
    hint = f"; there is something in {', '.join(inside[:5])}" if inside else ""
    return f"nothing to report in {str(folder)!r}: looked for {', '.join(_LOOKED_FOR)}{hint}; give the folder of a run"


def _kernels(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not str(content["schema"]).startswith("lightning-prune/kernel-report/1"):
            raise ValueError(f"it has schema {content['schema']!r}")
        if not all(isinstance(row, dict) and "layer" in row for row in content["layers"]):
            raise ValueError("a layer has no name")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(path)!r} is no kernel report ({error}); write it anew with `profile`") from None
    return dict(content)


def _without_passwords(text: str) -> str:
    """Addresses of databases may hold one.

    >>> _without_passwords("--storage postgresql://me:secret@host/db")
    '--storage postgresql://me:***@host/db'
    """
    return re.sub(r"(\w+://[^\s/:@'\"]*:)[^\s/'\"]+@", r"\1***@", text)
