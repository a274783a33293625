"""Parts of a model run on their own: each block, and what is around the blocks.

The model's own forward runs with something else in place of its blocks: so it makes the masks and positions that it
gives them, and whatever comes before and after them is its own code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from pared.fitting.calibration.watch import ProductWatch
from pared.fitting.streamed.parts.blocks import ModelBlocks, not_in_blocks
from pared.model.calls import Call
from pared.switches import ignoring

Middle = Callable[[Tensor], Tensor]  # what enters the first block to what leaves the last one


class _Stream:
    """Stands in the recorded arguments of a block for the hidden states; there is one of it in each process."""

    def __reduce__(self) -> str:
        return "_HERE"


_HERE: Final = _Stream()
# What a block cannot change when it is run; and what these may be in.
_CONSTANTS: Final = (bool, int, float, complex, str, torch.dtype, torch.device, type(None), _Stream)
_CONTAINERS: Final = (tuple, list, dict)


class _Enough(Exception):  # noqa: N818  # it is not an error: it ends a forward that need not go on
    """The last block was reached."""


@dataclass(frozen=True, eq=False)
class Arguments:
    """What the model gives its blocks in one call, beside the hidden states.

    Args:
        of_blocks: the positional and the keyword arguments of each block.
    """

    of_blocks: tuple[tuple[tuple[Any, ...], Mapping[str, Any]], ...]


class Chain:
    """A model as a chain of blocks.

    Args:
        model: its blocks are made to run on their own; nothing of it need be loaded yet.
        blocks: how it is divided.
    """

    def __init__(self, model: nn.Module, blocks: ModelBlocks) -> None:
        self._model = model
        self._modules = [model.get_submodule(name) for name in blocks.names]
        self.rest: tuple[Any, ...] | None = None  # what a block returns after the hidden states; None: only these
        self._kept: dict[object, Tensor] = {}  # tensors among the arguments, which calls share where they are equal

    def learn(self, call: Call) -> None:
        """Find out what a block returns: what is around the blocks and the first block have to be loaded.

        Raises:
            NotInBlocks: the first block does something else than the model's own forward expects of one.
        """
        first, own = self._modules[0], self._modules[0].forward
        found: list[Any] = []

        def run(*args: Any, **kwargs: Any) -> Any:
            found.append(own(*args, **kwargs))
            raise _Enough

        with standing([first], [run]), torch.no_grad(), ignoring():
            self._until_enough(call)
        output = found[0] if found else None
        hidden = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(hidden, Tensor) or not hidden.is_floating_point():
            raise not_in_blocks(f"its first block returns {type(output).__name__}", self._model)
        self.rest = tuple(output[1:]) if isinstance(output, tuple) else None

    def entering(self, call: Call) -> Tensor:
        """What enters the first block in a call: what is around the blocks has to be loaded."""
        found: list[Tensor] = []

        def run(*args: Any, **kwargs: Any) -> Any:
            found.append(self._without_stream(args, kwargs)[0])
            raise _Enough

        with standing(self._modules[:1], [run]), torch.no_grad(), ignoring():
            self._until_enough(call)
        return found[0]

    def start(self, call: Call) -> tuple[Tensor, Arguments]:
        """What enters the first block in a call, and what else all blocks get: what is around them has to be loaded.

        Raises:
            NotInBlocks: the model does something between its blocks; or it gives them more that depends on weights or
                on what other blocks return, or that a block may change.
        """
        entered: list[Tensor] = []
        passed: list[Tensor] = []
        recorded: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        rest = tree_map(_traced, self.rest)

        def stand(number: int) -> Callable[..., Any]:
            def record(*args: Any, **kwargs: Any) -> Any:
                if number != len(recorded):
                    raise not_in_blocks("its blocks do not run once each, one after the other", self._model)
                hidden, found = self._without_stream(args, kwargs)
                if passed and (hidden is not passed[-1] or hidden._version):
                    raise not_in_blocks("it changes the hidden states between its blocks", self._model)
                self._check_constant(number, found, tree_flatten(rest)[0])
                recorded.append(found)
                if not entered:
                    entered.append(hidden.clone())
                if number == len(self._modules) - 1:
                    raise _Enough
                passed.append(_traced(hidden))
                return self._returned(passed[-1], rest)

            return record

        # Gradients show what depends on weights, also where the model cuts them off.
        through = ProductWatch({}, _ignore, through=True)
        stands = [stand(i) for i in range(len(self._modules))]
        with standing(self._modules, stands), torch.enable_grad(), ignoring(), through:
            self._until_enough(call)
        if len(recorded) != len(self._modules):
            raise not_in_blocks("some of its blocks do not run", self._model)
        return entered[0].detach(), Arguments(tuple((args, kwargs) for args, kwargs in self._shared(recorded)))

    def block(self, number: int, hidden: Tensor, arguments: Arguments) -> Tensor:
        """What leaves a block, which has to be loaded."""
        given, spec = tree_flatten(arguments.of_blocks[number])
        args, kwargs = tree_unflatten([_beside(hidden, one) for one in given], spec)
        output = self._modules[number](*args, **kwargs)
        left = output if self.rest is None else output[0]
        if not isinstance(left, Tensor) or left.shape != hidden.shape:
            raise not_in_blocks(f"block {number} returns something else than hidden states", self._model)
        return left

    def around(self, call: Call, middle: Middle) -> Any:
        """The output of the model where something else stands for all of its blocks."""

        def first(*args: Any, **kwargs: Any) -> Any:
            return self._returned(middle(self._without_stream(args, kwargs)[0]), self.rest)

        def other(*args: Any, **kwargs: Any) -> Any:
            return self._returned(self._without_stream(args, kwargs)[0], self.rest)

        with standing(self._modules, [first, *[other] * (len(self._modules) - 1)]):
            return call.on(self._model)

    def _until_enough(self, call: Call) -> None:
        try:
            call.on(self._model)
        except _Enough:
            return
        raise not_in_blocks("its forward does not run its blocks", self._model)

    @staticmethod
    def _returned(hidden: Tensor, rest: tuple[Any, ...] | None) -> Any:
        return hidden if rest is None else (hidden, *rest)

    def _without_stream(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Any]:
        """The hidden states among the arguments, and the arguments without them."""
        if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
            return args[0], ((_HERE, *args[1:]), kwargs)
        for name, value in kwargs.items():
            if isinstance(value, Tensor) and value.is_floating_point() and name.startswith("hidden"):
                return value, (args, {**kwargs, name: _HERE})
        raise not_in_blocks("its blocks get no hidden states", self._model)

    def _check_constant(self, number: int, found: tuple[tuple[Any, ...], dict[str, Any]], rest: list[Any]) -> None:
        """Refuse arguments that are not the same whatever the weights are, and whenever the block is run."""
        named = [*((f"argument {place}", value) for place, value in enumerate(found[0])), *found[1].items()]
        for name, value in named:
            for one in tree_flatten(value, is_leaf=lambda found: not isinstance(found, _CONTAINERS))[0]:
                if not isinstance(one, (Tensor, *_CONSTANTS)):
                    what = f"block {number} gets {name}, a {type(one).__name__}, which it may change"
                    raise not_in_blocks(what, self._model)
                if isinstance(one, Tensor) and (one.requires_grad or any(one is other for other in rest)):
                    what = f"block {number} gets {name}, which depends on weights or on what another block returns"
                    raise not_in_blocks(what, self._model)

    def _shared(self, recorded: Any) -> Any:
        """The arguments, where equal tensors of all calls and blocks are one."""
        leaves, spec = tree_flatten(recorded)
        tensors = {id(one): one for one in leaves if isinstance(one, Tensor)}  # most are the same for all blocks
        known = {key: self._known(one) for key, one in tensors.items()}
        return tree_unflatten([known.get(id(one), one) for one in leaves], spec)

    def _known(self, tensor: Tensor) -> Tensor:
        numbers = tensor.detach().contiguous()
        digest = hashlib.sha256(numbers.reshape(-1).view(torch.uint8).numpy().data).digest()
        return self._kept.setdefault((numbers.shape, numbers.dtype, digest), numbers.clone())


def _beside(hidden: Tensor, given: Any) -> Any:
    """An argument of a block where its hidden states are, and these in their place."""
    if given is _HERE:
        return hidden
    return given.to(hidden.device) if isinstance(given, Tensor) else given


def _traced(value: Any) -> Any:
    """The same numbers, where they are floats cut off from others, and with gradients by what depends on them."""
    is_floats = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().requires_grad_().clone() if is_floats else value


def _ignore(_: object) -> None:
    """What is watched only for its gradients."""


@contextmanager
def standing(modules: list[nn.Module], forwards: list[Callable[..., Any]]) -> Iterator[None]:
    """Let functions stand for the forwards of modules."""
    for module, forward in zip(modules, forwards, strict=True):
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)
