"""Passes that reuse what an earlier pass over the same data computed before a changed weight is first used.

A recording keeps the output of every module call, from leaves to whole stages, and when each weight first met an
operation. A replay under another value of one weight returns the kept output of every call that had ended by then, the
outermost where calls are nested, and runs everything else. Nothing is assumed about the shape of the network: branches,
shared modules and weights that are used without their module are seen as they happen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from lightning_prune.targets import plain_name

T = TypeVar("T")


class CannotReplayError(Exception):
    """A pass did not go as the recorded one did."""


@dataclass
class Call:
    """One call of a module in a recorded pass; moments count operations.

    Args:
        module: that was called.
        begin: moment of the call.
        end: moment of its return.
        after: index of the first call that is not inside this one.
        output: what it returned; None unless it can be reused.
        versions: of the tensors in the output, which count changes in place.
        pure: whether the output was all that it left behind.
        reusable: whether returning the output again does what calling did.
        flops: that it took, where they were counted.
    """

    module: nn.Module
    begin: int
    end: int = 0
    after: int = 0
    output: Any = None
    versions: list[int] = field(default_factory=list)
    pure: bool = True
    reusable: bool = False
    flops: int = 0

    @property
    def changed(self) -> bool:
        """Whether somebody wrote into the output after it was returned."""
        return self.versions != _versions(_tensors(self.output))


class Recording:
    """What one pass of a network over one batch computed, ready to be used again.

    The pass runs twice where the network works in place on outputs that are to be kept.

    Args:
        network: in eval mode. Its parameters may change in place between passes, its modules may not.
        run: one pass without gradients, always over the same data; it may call the network, or parts of it, in any way.

    >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> x = torch.ones(1, 4)
    >>> with torch.no_grad():
    ...     recording = Recording(net, lambda: net(x))
    ...     _ = net[2].weight.zero_()
    ...     again = recording.replay("2.weight", lambda: net(x))
    ...     torch.equal(again, net(x)), [type(call.module).__name__ for call in recording.reused("2.weight")]
    (True, ['Linear', 'ReLU'])
    """

    def __init__(self, network: nn.Module, run: Callable[[], Any]) -> None:
        self.network, self.passes, self.total_flops = network, 0, 0
        self._copied: frozenset[int] = frozenset()
        while True:
            recorder = _Recorder(network, self._copied)
            with _intercepted(network, recorder.call), recorder:
                self.result = run()
            self.passes += 1
            changed = {index for index, call in enumerate(recorder.calls) if call.reusable and call.changed}
            if not changed:
                break
            self._copied |= changed
        self.calls, self._first_use = recorder.calls, recorder.first_use

    def reused(self, name: str) -> list[Call]:
        """The calls whose outputs a replay under another value of a weight takes from the recording."""
        until, found, index = self._until(name), [], 0
        while index < len(self.calls) and self.calls[index].begin < until:
            call = self.calls[index]
            reused = call.reusable and call.end < until
            found += [call] if reused else []
            index = call.after if reused else index + 1
        return found

    def replay(self, name: str, run: Callable[[], T], *, check: bool = False) -> T:
        """One pass in which at most one weight differs from the recorded pass.

        Args:
            name: of the weight. One that no operation was seen to use makes this a full pass.
            run: the pass, over the recorded data.
            check: compare what is computed with what was recorded, for a weight that does not differ.

        Raises:
            CannotReplayError: the pass called other modules than the recorded one or, with `check`, computed
                something else.
        """
        player = _Player(self.calls, self._until(name), self._copied, check)
        with _intercepted(self.network, player.call):
            result = run()
        if any(call.changed for call in self.reused(name)):
            raise CannotReplayError("an output was written into that the recorded pass left alone")
        return result

    def count(self, run: Callable[[], Any]) -> None:
        """Count the work of each call, in one more pass.

        Raises:
            CannotReplayError: the pass called other modules than the recorded one.
        """
        counter = FlopCounterMode(display=False)
        flops: list[int] = []

        def counting(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            index, before = len(flops), counter.get_total_flops()
            if index >= len(self.calls) or self.calls[index].module is not module:
                raise CannotReplayError(_OTHER_ORDER)
            flops.append(0)
            output = forward(*args, **kwargs)
            flops[index] = counter.get_total_flops() - before
            return output

        with _intercepted(self.network, counting), counter:
            run()
        self.take_count(flops, counter.get_total_flops())

    def take_count(self, flops: Sequence[int], total: int) -> None:
        """Know the work of each call from a recording of the same calls."""
        for call, work in zip(self.calls, flops, strict=True):
            call.flops = work
        self.total_flops = total

    def share_run(self, name: str) -> float:
        """The share of a pass, in FLOPs of convolutions and matrix products, that a replay computes."""
        if not self.total_flops:
            return 1.0
        return 1.0 - sum(call.flops for call in self.reused(name)) / self.total_flops

    def _until(self, name: str) -> int:
        return self._first_use.get(name, -1)


_OTHER_ORDER = "modules were called in another order: what the network runs depends on more than its input"


class _Recorder(TorchFunctionMode):
    """Notes the calls of modules and the first use of each weight."""

    def __init__(self, network: nn.Module, copied: frozenset[int]) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.first_use: dict[str, int] = {}
        self._now, self._copied = 0, copied
        self._names: dict[int, list[str]] = {}
        for name, parameter in network.named_parameters():
            self._names.setdefault(_storage(parameter), []).append(plain_name(name))
        self._own = self._names.keys() | {_storage(buffer) for buffer in network.buffers()}
        self._hooked = {module for module in network.modules() if module._forward_hooks or module._forward_pre_hooks}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._now += 1
        for tensor in _tensors((args, kwargs)):
            for name in self._names.get(_storage(tensor), ()):
                self.first_use.setdefault(name, self._now)
        return func(*args, **(kwargs or {}))

    def call(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._now += 1
        index, call = len(self.calls), Call(module, begin=self._now)
        self.calls.append(call)
        inputs = _tensors((args, kwargs))
        versions, attributes = _versions(inputs), _attributes(module)
        output = forward(*args, **kwargs)
        self._now += 1
        call.end, call.after = self._now, len(self.calls)
        inside = self.calls[index + 1 :]
        # Hooks of the module itself run around a reused call too, those of modules inside it do not.
        call.pure = attributes == _attributes(module) and all(
            inner.pure and inner.module not in self._hooked for inner in inside
        )
        # A view of an input or a weight, returned again, would be a view of what it was then.
        taken = {_storage(tensor) for tensor in inputs} | self._own
        leaves = tree_leaves(output)
        new = bool(leaves) and all(isinstance(leaf, Tensor) and _storage(leaf) not in taken for leaf in leaves)
        call.reusable = call.pure and new and versions == _versions(inputs)
        if call.reusable:
            call.output = _clone(output) if index in self._copied else output
            call.versions = _versions(_tensors(call.output))
        return output


class _Player:
    """Answers calls from a recording as long as a weight is unused."""

    def __init__(self, calls: Sequence[Call], until: int, copied: frozenset[int], check: bool) -> None:
        self._calls, self._until, self._copied, self._check = calls, until, copied, check
        self._next = 0

    def call(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        index, known = self._next, self._next < len(self._calls)
        if not self._check and (not known or self._calls[index].begin > self._until):
            return forward(*args, **kwargs)  # from here on what runs may depend on the weight
        if not known or self._calls[index].module is not module:
            raise CannotReplayError(_OTHER_ORDER)
        call = self._calls[index]
        if call.reusable and call.end < self._until:
            self._next = call.after
            # Whoever works in place on it gets a copy of their own.
            return _clone(call.output) if index in self._copied else call.output
        self._next = index + 1
        output = forward(*args, **kwargs)
        if self._check and call.reusable and not _same(output, call.output):
            raise CannotReplayError(
                f"the same pass gave another output of {type(module).__name__}: it is random, or keeps state"
            )
        return output


@contextlib.contextmanager
def _intercepted(network: nn.Module, handler: Callable[..., Any]) -> Iterator[None]:
    """Lets `handler(module, forward, *args, **kwargs)` answer the calls of every module but scripted ones."""
    modules = [module for module in network.modules() if not isinstance(module, torch.jit.ScriptModule)]
    own = [module.__dict__.get("forward") for module in modules]
    try:
        for module in modules:
            module.__dict__["forward"] = partial(handler, module, module.forward)
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward


def _attributes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Which objects a module holds, by itself and in lists and dictionaries."""
    found = {}
    for name, value in module.__dict__.items():
        content = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        found[name] = (id(value), *map(id, content))
    return found


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]


def _clone(tree: Any) -> Any:
    return tree_map_only(Tensor, torch.clone, tree)


def _storage(tensor: Tensor) -> int:
    """Names the memory of a tensor; of sparse and nested ones the tensor itself."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return -id(tensor)


def _same(one: Any, other: Any) -> bool:
    """Whether two results hold the same numbers, NaN where the other has NaN."""
    pairs = list(zip(tree_leaves(one), tree_leaves(other), strict=True))
    return all(a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all()) for a, b in pairs)
