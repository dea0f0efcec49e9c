"""Keeping removed weights at zero while somebody else trains: masks on weights, gradients and optimizer state.

A removed weight stays exactly 0 through an optimizer step if its gradient, its optimizer state and the weight itself
are 0 and the optimizer maps zeros to zero. So gradients are masked before a step, one pass over memory, and for the
optimizers of `ZERO_PRESERVING` nothing else is needed. After a step of any other optimizer, and after steps whose
gradients were not seen, weights are masked again.

Masking is a bitwise and with all ones or all zeros: as fast as a product, and it turns NaN into 0 too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_prune.targets import plain_name

ZERO_PRESERVING: frozenset[type[Optimizer]] = frozenset(
    {
        torch.optim.SGD,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.Adamax,
        torch.optim.RMSprop,
        torch.optim.Adagrad,
        torch.optim.Adadelta,
    }
)
"""Optimizers that leave a zero weight with zero gradient and zero state at zero; subclasses may not."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Enforcer:
    """Applies masks to parameters, their gradients, their optimizer state and copies of them.

    It keeps an integer as wide as the weight for each weight: 4 bytes beside every float32.

    Args:
        parameters: plain name -> the parameter to watch over.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)
        self._names = {id(parameter): name for name, parameter in self.parameters.items()}
        self._bits: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._gradients_masked: set[int] = set()
        self._trusted = True
        self.stepped = False
        """Whether an optimizer step has happened since this was last set to False."""

    def set(self, masks: Mapping[str, Tensor]) -> None:
        """Take new masks and zero the removed weights."""
        for name, mask in masks.items():
            parameter = self.parameters[name]
            bits = torch.empty_like(parameter, dtype=_INTEGERS[parameter.element_size()], requires_grad=False)
            self._bits[name] = bits.copy_(mask).neg_()  # True -> -1, all bits set
        self.mask_weights()

    def mask_weights(self) -> None:
        """Zero the removed weights."""
        for name, bits in self._bits.items():
            _and(self.parameters[name].detach(), bits)

    def mask_state(self, optimizers: Iterable[Optimizer]) -> None:
        """Zero the optimizer state (momentum, second moments) of removed weights."""
        for optimizer in optimizers:
            for parameter, state in optimizer.state.items():
                bits = self._bits.get(self._names.get(id(parameter), ""))
                if bits is None:
                    continue
                for value in state.values():
                    if isinstance(value, Tensor) and value.shape == bits.shape:
                        _and(value, bits)

    def mask_copy(self, module: nn.Module) -> None:
        """Zero the removed weights in a copy of the model, such as an average of its weights."""
        copied = {plain_name(name): parameter for name, parameter in module.named_parameters()}
        # torch's AveragedModel keeps its copy as the child "module"; a model may have a child of that name as well.
        prefix = "" if self._bits.keys() <= copied.keys() else "module."
        for name, parameter in copied.items():
            bits = self._bits.get(name.removeprefix(prefix))
            if bits is not None and bits.shape == parameter.shape:
                _and(parameter.detach(), bits)

    def owned(self, optimizer: Optimizer) -> dict[str, nn.Parameter]:
        """The watched parameters that an optimizer updates and that have a gradient."""
        return {
            self._names[id(parameter)]: parameter
            for group in optimizer.param_groups
            for parameter in group["params"]
            if id(parameter) in self._names and parameter.grad is not None
        }

    def mask_gradients(self, optimizer: Optimizer) -> None:
        """Zero the gradients of removed weights, before `optimizer` uses them."""
        dense = True
        for name, parameter in self.owned(optimizer).items():
            gradient = parameter.grad
            if gradient is None or name not in self._bits:
                continue
            if gradient.layout is torch.strided:
                _and(gradient, self._bits[name])
            else:
                dense = False
        if dense:
            self._gradients_masked.add(id(optimizer))

    def attach(self, optimizers: Iterable[Optimizer], gradients_stay: bool = True) -> None:
        """Watch over the steps of these optimizers; what was attached before is let go.

        Args:
            optimizers: those that update the parameters.
            gradients_stay: whether nobody changes gradients between `mask_gradients` and the step.
        """
        self.detach()
        self._trusted = gradients_stay
        self._handles = [optimizer.register_step_post_hook(self._after_step) for optimizer in optimizers]

    def detach(self) -> None:
        """Let go of all optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._gradients_masked.clear()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.stepped = True
        masked = id(optimizer) in self._gradients_masked
        self._gradients_masked.discard(id(optimizer))
        if not (masked and self._trusted and type(optimizer) in ZERO_PRESERVING):
            self.mask_weights()


def _and(tensor: Tensor, bits: Tensor) -> None:
    if tensor.element_size() == bits.element_size():
        tensor.view(bits.dtype).bitwise_and_(bits.to(tensor.device))
    else:  # say, float32 state of a bfloat16 parameter
        tensor.masked_fill_(bits.to(tensor.device) == 0, 0)
