"""Weights from a file into a network, without running code that the file may carry."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_prune.targets import plain_name
from lightning_prune.zoo.datasets import data_folder


def load_weights(network: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load weights into a network, in place.

    The file holds a state dict or a checkpoint with one under `state_dict` (Lightning's, and the
    published CIFAR ResNets); the prefixes `module.`, `_orig_mod.` and `network.` are removed.
    It is read with `weights_only=True`, so a file from elsewhere cannot run code.

    Args:
        network: Receives the weights.
        path: File written by `torch.save`; a relative path also means one in the data folder.

    Raises:
        ValueError: The file is no such file, or its names or shapes are not those of the network.
        FileNotFoundError: There is no file.
    """
    if not Path(path).is_file() and (data_folder() / path).is_file():
        path = data_folder() / path
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"No weights at {os.fspath(path)!r}; check the path (it may lie in {str(data_folder())!r}, too), or drop "
            "initialize_from."
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        raise ValueError(
            f"{os.fspath(path)!r} cannot be read as weights ({type(error).__name__}); "
            "it should hold a state dict written by torch.save."
        ) from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"{os.fspath(path)!r} holds {type(state).__name__}, not a state dict of tensors; "
            "save it with torch.save(network.state_dict(), path)."
        )
    renamed = {_own_name(name): value for name, value in state.items()}
    own = network.state_dict()
    # Files from before torch 0.4.1 lack these counters, which only an averaging BatchNorm reads.
    counters = {name for name in own if name.endswith("num_batches_tracked")}
    missing = [name for name in own if name not in renamed and name not in counters]
    unknown = [name for name in renamed if name not in own]
    reshaped = [
        f"{name} {list(renamed[name].shape)} instead of {list(own[name].shape)}"
        for name in own
        if name in renamed and renamed[name].shape != own[name].shape
    ]
    if missing or unknown or reshaped:
        raise ValueError(
            f"{os.fspath(path)!r} does not fit {type(network).__name__}: "
            f"missing {_some(missing)}, unknown {_some(unknown)}, shaped otherwise {_some(reshaped)}; "
            "build the network with the arguments (depth, classes) that the weights were trained with."
        )
    network.load_state_dict({**own, **renamed})


def _own_name(name: str) -> str:
    return plain_name(name.removeprefix("module.").removeprefix("network."))


def _some(names: list[str], limit: int = 3) -> str:
    shown = ", ".join(names[:limit]) or "none"
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown
