"""Watches one forward pass of a model and reports every use of a weight, without changing the model.

Operations are watched where PyTorch dispatches them, not at modules, so weights that are used
functionally, several times or in slices are seen as well. Shapes are all that is asked for: the pass
runs on fake tensors, which hold neither numbers nor memory. Only where those do not suffice, because
the shapes inside the model depend on its data (as in detection), does it run for real.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_prune.operators import RULES, Arguments, Owners, WeightUse
from lightning_prune.targets import plain_name

aten = torch.ops.aten


def weight_uses(model: nn.Module, example_inputs: Any) -> list[WeightUse]:
    """Every use of a parameter of the model by a layer-like operation, in execution order.

    Args:
        model: any module; it is run in eval mode and left as it was found, its hooks included.
        example_inputs: a tuple holds positional arguments, a mapping keyword arguments; anything else,
            a tensor or a list say, is the only argument. Tensors are taken to the model's device.

    Raises:
        ValueError: the model does not run on these inputs.
    """
    device = _device(model)
    if isinstance(example_inputs, Mapping):
        example_inputs = dict(example_inputs)  # tensors are found in plain dicts only
    with _untouched(model):
        try:
            return _on_fake_tensors(model, example_inputs, device)
        except Exception as error:  # whatever a forward may raise when it meets fake tensors
            reason = error
    on_meta = device == torch.device("meta")
    if not on_meta:
        with _untouched(model):
            try:
                return _for_real(model, example_inputs, device)
            except Exception as error:
                reason = error
    shapes = tree_map_only(Tensor, lambda tensor: (tuple(tensor.shape), tensor.dtype), example_inputs)
    remedy = (
        "If its shapes depend on data it needs memory first: model.to_empty(device='cpu')."
        if on_meta
        else "A tuple holds several positional arguments, a dict keyword arguments, anything else is the "
        "only argument; shapes and dtypes must be what forward expects."
    )
    raise ValueError(
        f"{type(model).__name__} did not run on the example inputs {shapes}: "
        f"{type(reason).__name__}: {reason}\n{remedy}"
    ) from reason


def _on_fake_tensors(model: nn.Module, example_inputs: Any, device: torch.device | None) -> list[WeightUse]:
    mode = FakeTensorMode()
    inputs = tree_map_only(Tensor, lambda tensor: mode.from_tensor(_moved(tensor, device)), example_inputs)
    recorder = _Recorder(Owners(), mode)
    fakes = []  # their storage must live as long as the recorder looks it up
    for name, tensor in _tensors_of(model):
        fakes.append(mode.from_tensor(tensor))
        recorder.owners.add(fakes[-1], name)
    with _quiet(), mode, recorder:
        call(model, inputs)
    return recorder.uses


def _for_real(model: nn.Module, example_inputs: Any, device: torch.device | None) -> list[WeightUse]:
    recorder = _Recorder(Owners())
    for name, tensor in _tensors_of(model):
        recorder.owners.add(tensor, name)
    _run_for_real(model, example_inputs, device, recorder)
    return recorder.uses


def _run_for_real(model: nn.Module, inputs: Any, device: torch.device | None, mode: TorchDispatchMode) -> Any:
    # A forward that works in place would otherwise write into the caller's example.
    inputs = tree_map_only(Tensor, lambda tensor: _moved(tensor.detach().clone(), device), inputs)
    with buffers_kept(model), mode:
        return call(model, inputs)


def observe(model: nn.Module, example_inputs: Any, mode: TorchDispatchMode) -> Any:
    """Run a model for real, in eval mode, while a mode watches its operations, and leave it as it was found.

    Args:
        model: any module.
        example_inputs: as for `weight_uses`.
        mode: sees every operation.
    """
    if isinstance(example_inputs, Mapping):
        example_inputs = dict(example_inputs)
    with _untouched(model):
        return _run_for_real(model, example_inputs, _device(model), mode)


def _tensors_of(model: nn.Module) -> Iterator[tuple[str | None, Tensor]]:
    for name, parameter in model.named_parameters():
        yield plain_name(name), parameter
    for buffer in model.buffers():
        yield None, buffer


def call(model: nn.Module, inputs: Any) -> Any:
    """Run a model on example inputs: a tuple holds positional arguments, a dict keyword arguments."""
    if type(inputs) is tuple:  # a named tuple, such as a packed sequence, is one argument
        return model(*inputs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(inputs)


def _device(model: nn.Module) -> torch.device | None:
    """The one device of the model, None when it has several or no tensors."""
    devices = {tensor.device for _, tensor in _tensors_of(model)}
    return devices.pop() if len(devices) == 1 else None


def _moved(tensor: Tensor, device: torch.device | None) -> Tensor:
    return tensor if device is None else tensor.to(device)


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Runs the model in eval mode, uncompiled and without gradients, and then undoes what that left behind.

    A forward may store tensors on its modules (anchors, caches); fake ones must not survive there. Hence
    every attribute, registered tensor and element of a list or dict attribute is put back.
    """
    modules = list(model.modules())
    attributes = [(module, dict(module.__dict__)) for module in modules]
    contents = [
        (value, value.copy()) for _, values in attributes for value in values.values() if isinstance(value, dict | list)
    ]
    training = [module.training for module in modules]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        for module in modules:
            module.training = False
        torch.backends.mha.set_fastpath_enabled(False)  # a fused kernel would hide the layers inside
        with _generators_kept(model), _uncompiled(), torch.inference_mode():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        torch.clear_autocast_cache()  # which may hold copies made here
        for value, content in contents:
            value.clear()
            value.update(content) if isinstance(value, dict) else value.extend(content)
        for module, values in attributes:
            for name in module.__dict__.keys() - values.keys():
                del module.__dict__[name]
            module.__dict__.update(values)
        for module, flag in zip(modules, training, strict=True):
            module.training = flag  # scripted modules keep it outside their __dict__


def _generators_kept(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Puts back the states of the random generators of the CPU and of the model's accelerators."""
    devices = {tensor.device for _, tensor in _tensors_of(model)} - {
        torch.device("cpu"),
        torch.device("meta"),
    }
    kinds = {device.type for device in devices}
    if len(kinds) != 1:
        return torch.random.fork_rng(devices=[])
    indices = [device.index or 0 for device in devices]
    return torch.random.fork_rng(devices=indices, device_type=kinds.pop())


def _uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Runs compiled modules as they were written, where this PyTorch (2.6 or newer) can be told to."""
    set_stance = getattr(torch.compiler, "set_stance", None)
    return contextlib.nullcontext() if set_stance is None else set_stance("force_eager")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps fake tensors from logging a traceback of what is then tried for real, or raised, anyway."""
    logger = logging.getLogger(FakeTensorMode.__module__)
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled


@contextlib.contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Puts back the values of buffers that a forward wrote to in place."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in buffers:
            buffer.copy_(value)


_CONSTANTS = (aten.lift_fresh.default, aten.lift_fresh_copy.default)  # the fake mode knows their values


class _Recorder(TorchDispatchMode):
    """Applies the rules to every operation and follows what becomes of the weights."""

    def __init__(self, owners: Owners, fake_mode: FakeTensorMode | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.owners = owners
        self.fake_mode = fake_mode
        self.uses: list[WeightUse] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.fake_mode is not None and func not in _CONSTANTS:
            # Parameters and other tensors stay in place on the modules; the same fake enters for each.
            args, kwargs = tree_map_only(_is_real, self.fake_mode.from_tensor, (args, kwargs))
        rule = RULES.get(func)
        if rule is None and isinstance(func, OpOverload) and func.namespace != "prim":  # prim has no kernels
            with self:  # a composite operator is watched from within
                output = func.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
        output = func(*args, **kwargs)
        uses = [] if rule is None else list(rule(_by_name(func, args, kwargs), output, self.owners))
        self.uses += uses
        if not uses:
            self.owners.follow(_tensors((args, kwargs)), _tensors(output))
        return output


def _by_name(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    schema = func._schema.arguments
    defaults = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    return defaults | {argument.name: value for argument, value in zip(schema, args, strict=False)} | kwargs


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, FakeTensor)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
