"""Curves and texts from TensorBoard's event files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

Curve = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Events:
    """What a run logged.

    Args:
        scalars: tag -> steps and values, in order.
        texts: tag -> the last text.
    """

    scalars: Mapping[str, Curve] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return bool(self.scalars) or bool(self.texts)

    def last(self, tag: str) -> float | None:
        """The last value of a scalar, None if it was never logged."""
        curve = self.scalars.get(tag)
        return curve[-1][1] if curve else None


def read_events(folder: Path) -> Events:
    """What the event files in a folder (not below it) hold; nothing where there are none."""
    if not any(folder.glob("events.out.tfevents.*")):
        return Events()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # 0 keeps all; of pictures and histograms nothing is shown.
    sizes = {"scalars": 0, "tensors": 1, "images": 1, "histograms": 1, "compressedHistograms": 1, "audio": 1}
    accumulator = EventAccumulator(str(folder), size_guidance=sizes)
    accumulator.Reload()
    tags = accumulator.Tags()
    scalars = {tag: tuple((each.step, each.value) for each in accumulator.Scalars(tag)) for tag in tags["scalars"]}
    texts = {}
    for tag in tags["tensors"]:
        if tag.endswith("/text_summary"):
            strings = accumulator.Tensors(tag)[-1].tensor_proto.string_val
            texts[tag.removesuffix("/text_summary")] = "\n".join(each.decode("utf-8", "replace") for each in strings)
    return Events(scalars, texts)
