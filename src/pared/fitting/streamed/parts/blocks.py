"""The blocks of a model: the repeated children that pass a stream of hidden states on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from pared.errors import ModelError, ParedError, reason_of
from pared.model.tensors import ModelTensor, ModelTensors

ResultT = TypeVar("ResultT")


class NotInBlocks(ModelError):  # noqa: N818  # named like what it says of the model
    """The model cannot be fitted block by block."""


@dataclass(frozen=True, eq=False)
class ModelBlocks:
    """How a model is divided.

    Args:
        names: those of the blocks' modules, in the order in which they run.
        tensors: the first names of each block's tensors.
        outside: the first names of all others: embeddings, the last norm, the head.
    """

    names: tuple[str, ...]
    tensors: tuple[tuple[str, ...], ...]
    outside: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)


def find_blocks(tensors: ModelTensors[nn.Module]) -> ModelBlocks:
    """Divide a model into its blocks and what is around them.

    Args:
        tensors: those of the model, whose numbers are not looked at.

    Raises:
        NotInBlocks: no list of modules holds most of the weights beside the tables, or they share tensors.
    """
    lists = {
        name: module
        for name, module in tensors.model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1
    }
    sizes = {name: _numbers(module) for name, module in lists.items()}
    if not sizes:
        raise not_in_blocks("it has no list of modules", tensors.model)
    chosen = max(sizes, key=lambda name: (sizes[name], -len(name)))
    tables = sum(one.tensor.numel() for one in tensors if isinstance(one.module, nn.Embedding))
    if 2 * sizes[chosen] < sum(one.tensor.numel() for one in tensors) - tables:
        raise not_in_blocks(
            f"its longest list of modules, {chosen}, holds less than half of its weights", tensors.model
        )
    names = tuple(f"{chosen}.{i}" for i in range(len(lists[chosen])))
    owners = {one.name: _owners(one, names) for one in tensors}
    shared = [name for name, owner in owners.items() if len(owner) > 1]
    if shared:
        raise not_in_blocks(f"{shared[0]} belongs to more than one of its parts", tensors.model)
    by_block: Mapping[str, list[str]] = {name: [] for name in ("", *names)}
    for name, owner in owners.items():
        by_block[next(iter(owner))].append(name)
    return ModelBlocks(names, tuple(tuple(by_block[name]) for name in names), tuple(by_block[""]))


def _owners(tensor: ModelTensor, blocks: tuple[str, ...]) -> set[str]:
    """The blocks that a tensor's names lie in; "" for outside."""
    known = set(blocks)
    depth = blocks[0].count(".") + 1
    return {head if (head := ".".join(name.split(".")[:depth])) in known else "" for name in tensor.names}


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def not_in_blocks(why: str, model: nn.Module) -> NotInBlocks:
    """The error for a model that does something else than pass a stream from block to block."""
    return NotInBlocks(
        f"cannot be fitted block by block: {why}",
        where=type(model).__name__,
        remedy="Fit it as a whole, which takes about five times the memory of its float32 weights.",
    )


def of_batch(number: int, block: int | None = None) -> str:
    """Where a batch of calibration runs, for messages: in a block, or around all of them."""
    return f"calibration: batch {number}" + ("" if block is None else f", block {block}")


def differentiated(take: Callable[[], ResultT], where: str, model: nn.Module) -> ResultT:
    """What a function returns that takes gradients of a run which went well without them.

    Args:
        take: the function.
        where: as `of_batch` says it.
        model: that which runs, or of which a part does.

    Raises:
        NotInBlocks: the model has raised something, which is the cause.
    """
    try:
        return take()
    except ParedError:
        raise
    except Exception as error:  # whatever autograd, or the model's own backward, raises
        raise not_in_blocks(f"it has no gradient ({where}): {reason_of(error)}", model) from error
