"""The network of a command: with its weights, where the Trainer would put it, and inputs to run it on."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_prune.preparation import inference_copy

_LOADERS = (
    ("validate", "val_dataloader"),
    ("predict", "predict_dataloader"),
    ("test", "test_dataloader"),
    ("fit", "train_dataloader"),
)
"""Where an example may come from: stage and loader, the first that there is."""


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Compute with so many threads, and with as many as before afterwards.

    Raises:
        ValueError: it is no positive number.
    """
    if threads < 1:
        raise ValueError(f"times are measured with at least one thread, got threads={threads!r}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def network_of(
    trainer: Trainer, model: LightningModule, ckpt_path: str | Path | None, weights_only: bool | None = None
) -> LightningModule:
    """A copy of the model for inference, on the device and in the precision of the Trainer.

    Args:
        trainer: who knows device and precision.
        model: it is not changed.
        ckpt_path: of a Lightning checkpoint whose weights the copy takes.
        weights_only: whether it may hold nothing but tensors and plain containers; it may not hold more unless False.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is no checkpoint or not of this model, or the precision is mixed.
    """
    if "mixed" in str(trainer.precision):
        raise ValueError(
            f"latency is measured with weights of one type, and trainer.precision={trainer.precision!r} mixes two; "
            "give --trainer.precision 32-true, or bf16-true or 16-true where you deploy so"
        )
    network = _copy(model)
    if is_overridden("configure_model", network):
        network.trainer = trainer
        network.configure_model()
    if ckpt_path is not None:
        _load(network, ckpt_path, weights_only is not False)
    network = network.to(trainer.strategy.root_device)
    converted = trainer.precision_plugin.convert_module(network)
    if not isinstance(converted, LightningModule):
        raise ValueError(
            f"trainer.precision={trainer.precision!r} replaces the model; give --trainer.precision 32-true"
        )
    return _copy(converted)


def example_inputs(
    trainer: Trainer, model: LightningModule, datamodule: LightningDataModule | None, batch_size: int
) -> Any:
    """Inputs for one pass: the model's `example_input_array`, or those of the first batch of validation data.

    Args:
        trainer: who knows the precision.
        model: whose inputs they are.
        datamodule: asked for validation, prediction, test or training data, the first that it has; without one, the
            model is.
        batch_size: how many examples; those that there are, cut or repeated.

    Raises:
        ValueError: there is neither an example nor data.
    """
    if batch_size < 1:
        raise ValueError(f"a pass has at least one example, got batch_size={batch_size!r}")
    inputs = model.example_input_array
    if inputs is None:
        batch = _first_batch(datamodule if datamodule is not None else model)
        if batch is None:
            raise ValueError(
                f"there is nothing to run {type(model).__name__} on: set its example_input_array, or give data "
                "(--data, or a datamodule) with a validation, prediction, test or training loader that is not empty"
            )
        inputs = batch[0] if isinstance(batch, tuple | list) and batch else batch
    return trainer.precision_plugin.convert_input(_resized(inputs, batch_size))


def _first_batch(source: LightningDataModule | LightningModule) -> Any:
    prepared = False
    for stage, name in _LOADERS:
        if not is_overridden(name, source):
            continue
        if not prepared:
            source.prepare_data()
            prepared = True
        source.setup(stage)
        try:
            loader = getattr(source, name)()
            while isinstance(loader, list | tuple | Mapping) and loader:
                loader = next(iter(loader.values() if isinstance(loader, Mapping) else loader))
            for batch in loader or ():
                return source.on_after_batch_transfer(source.on_before_batch_transfer(batch, 0), 0)
        finally:
            source.teardown(stage)
    return None


def _resized(inputs: Any, batch_size: int) -> Any:
    """Tensors with as many rows as the first one has, cut or repeated to `batch_size`; others as they are.

    >>> _resized((torch.tensor([[1.0], [2.0]]), torch.tensor(3.0)), 3)
    (tensor([[1.], [2.], [1.]]), tensor(3.))
    """
    rows = next((len(leaf) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.ndim), 0)
    if not rows:
        raise ValueError("the example inputs hold no tensor with examples in its first dimension, or one without any")
    index = torch.arange(batch_size) % rows
    return tree_map_only(
        Tensor, lambda x: x[index.to(x.device)].contiguous() if x.ndim and len(x) == rows else x, inputs
    )


def _copy(model: LightningModule) -> LightningModule:
    return cast(LightningModule, inference_copy(model))


def _load(network: LightningModule, path: str | Path, weights_only: bool) -> None:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=weights_only)
        state = checkpoint["state_dict"]
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no checkpoint at {str(path)!r}; correct ckpt_path") from None
    except (RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f"{str(path)!r} is no whole Lightning checkpoint: {error}; correct ckpt_path") from None
    network.on_load_checkpoint(checkpoint)
    try:
        network.load_state_dict(state, strict=network.strict_loading)
    except RuntimeError as error:
        raise ValueError(f"the checkpoint {str(path)!r} does not fit {type(network).__name__}: {error}") from None
