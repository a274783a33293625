"""A device that is not the CPU, emulated: its tensors hold the numbers of others, and do not mix with the CPU's."""

from __future__ import annotations

import pickle
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from pared.executors.executor import LOCAL_SHARE, InputT, ResultT, Task
from pared.switches import computing_on

# A kind that torch knows, that nothing here implements, and whose gradients are computed in the thread that asks.
DEVICE = "lazy"
_MOVES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)


class Elsewhere(Tensor):
    """A tensor there."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> Elsewhere:
        """Stand for these numbers."""
        made: Elsewhere = torch.Tensor._make_wrapper_subclass(
            cls, numbers.shape, strides=numbers.stride(), dtype=numbers.dtype, device=DEVICE
        )
        made.numbers = numbers
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own has no class for its first argument
        cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operator."""
        return _run(func, args, kwargs or {})


class Device(TorchDispatchMode):
    """While it is entered, there is such a device.

    Attributes:
        ran: the names of the operators that ran there.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.ran: set[str] = set()

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator."""
        if any(isinstance(one, Elsewhere) for one in tree_leaves((args, kwargs))):
            self.ran.add(func._schema.name.removeprefix("aten::"))
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    there = any(isinstance(one, Elsewhere) for one in tensors)
    if there and func not in _MOVES:
        mixed = [one for one in tensors if not isinstance(one, Elsewhere) and one.dim()]
        assert not mixed, f"{func} mixes devices"
    to = kwargs.get("device")
    if to is not None:
        there = torch.device(to).type == DEVICE
        kwargs = {**kwargs, "device": "cpu"}
    if func is torch.ops.aten._fused_sdp_choice.default:
        return 0  # composed of products
    if func is torch.ops.aten.copy_.default:
        args[0].numbers.copy_(_plain(args[1])) if isinstance(args[0], Elsewhere) else args[0].copy_(_plain(args[1]))
        return args[0]
    if func is torch.ops.aten.histc.default and not args[0].is_floating_point():
        args = (args[0].float(), *args[1:])  # which GPUs have for whole numbers, too
    found = func(*tree_map(_plain, args), **tree_map(_plain, kwargs))
    if not there:
        return found
    made = tree_map(lambda one: Elsewhere(one) if isinstance(one, Tensor) else one, found)
    return made if to is not None else return_and_correct_aliasing(func, args, kwargs, made)


def _plain(value: Any) -> Any:
    return value.numbers if isinstance(value, Elsewhere) else value


class Workers:
    """Runs tasks here; those that may compute on a device do it on the emulated one.

    Args:
        device: see `Executor`.
    """

    share = LOCAL_SHARE
    workers = 2
    threads = 1

    def __init__(self, device: str = DEVICE) -> None:
        self.device = device
        self.emulated = Device()

    def map(self, task: Task[InputT, ResultT], inputs: Sequence[InputT]) -> Iterator[ResultT]:
        """See `Executor`."""
        for one in inputs:
            run, given = pickle.loads(pickle.dumps((task.run, one)))
            with self.emulated, computing_on(self.device if task.on_device else "cpu"):
                found = run(given)
            yield pickle.loads(pickle.dumps(found))  # which no tensor there can be

    def check_files(self, files: Collection[Path]) -> None:
        """See `Executor`."""

    def check_writes(self, directory: Path) -> None:
        """See `Executor`."""
