"""Sums of what gradients show: squares over rows of each weight, second moments of its inputs, noise in its inputs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, TypeVar

import torch
from torch import Tensor, nn

from pared.fitting.calibration.blocks import Blocks, add_up, blocks_of, by_name, complete
from pared.fitting.calibration.gathering.noise import Noise
from pared.fitting.calibration.gathering.pieces import Pieces, may_be_in_pieces
from pared.fitting.calibration.watch import Product, ProductWatch
from pared.model.tensors import ModelTensors

log = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")

_SMALL: Final = 4096  # numbers: tensors with fewer are added up together, if they are alike


@dataclass(frozen=True, eq=False)
class Sums:
    """What was summed up, by the tensors' first names.

    Args:
        rows: float64 (rows of the view,): the squares of the gradients.
        moments: float32 (blocks, columns, columns): second moments of the gradients.
        unseen: the part of `moments` from every other direction.
        layouts: how the blocks cover each weight's matrix.
        uses: float64 (rows,): how often each row of a table was looked up.
        noise: what noise in the inputs of products costs.
    """

    rows: Mapping[str, Tensor] = field(default_factory=dict)
    moments: Mapping[str, Tensor] = field(default_factory=dict)
    unseen: Mapping[str, Tensor] = field(default_factory=dict)
    layouts: Mapping[str, Blocks] = field(default_factory=dict)
    uses: Mapping[str, Tensor] = field(default_factory=dict)
    noise: Mapping[str, Noise] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Totals:
    """Sums so far: those of some calls are added to those of others.

    Args:
        rows: by the names of tensors alike, of all together (tensors, ...); see `Sums`.
        moments: likewise.
        unseen: likewise.
        uses: by name.
        noise: by name.
    """

    rows: dict[tuple[str, ...], Tensor] = field(default_factory=dict)
    moments: dict[tuple[str, ...], Tensor] = field(default_factory=dict)
    unseen: dict[tuple[str, ...], Tensor] = field(default_factory=dict)
    uses: dict[str, Tensor] = field(default_factory=dict)
    noise: dict[str, Noise] = field(default_factory=dict)

    def add(self, more: Totals) -> None:
        """Add the sums of other calls."""
        for mine, others in ((self.rows, more.rows), (self.moments, more.moments), (self.unseen, more.unseen)):
            for names, value in others.items():
                add_up(mine, names, value)
        for name, counted in more.uses.items():
            add_up(self.uses, name, counted)
        for name, one in more.noise.items():
            known = self.noise.get(name, Noise())
            self.noise[name] = Noise(known.total + one.total, known.dynamic + one.dynamic)

    def here(self) -> Totals:
        """The same in the memory of the CPU."""
        rows, moments, unseen = (
            {names: value.cpu() for names, value in one.items()} for one in (self.rows, self.moments, self.unseen)
        )
        return Totals(rows, moments, unseen, {name: value.cpu() for name, value in self.uses.items()}, self.noise)

    def sums(self, layouts: Mapping[str, Blocks], rounds: int) -> Sums:
        """What was summed up.

        Args:
            layouts: how the blocks cover each weight's matrix, in the order of the tensors.
            rounds: how often each call was made, by which the uses of tables are divided.
        """
        uses = {name: counted / rounds for name, counted in self.uses.items()}
        rows, moments, unseen = map(by_name, (self.rows, self.moments, self.unseen))
        for name, part in unseen.items():
            complete(part, moments[name])
        noise = {name: one for name, one in self.noise.items() if one.seen}
        ordered = {name: rows[name] for name in layouts if name in rows}
        return Sums(ordered, moments, unseen, layouts, uses, noise)


class Gathering:
    """Takes gradients of what tensors compute, and sums up what they show.

    Args:
        tensors: those of the model, whose numbers may be given gradients.
        kinds: which of its tensors are looked at, "parameter" and "buffer".
        moments: whether second moments are wanted, which rounding with feedback needs.
        through: see `ProductWatch`.
    """

    def __init__(
        self, tensors: ModelTensors[nn.Module], kinds: Sequence[str], *, moments: bool = True, through: bool = True
    ) -> None:
        self._tensors = tensors
        self._wants_moments = moments
        self._through = through
        self._probed = {tensor.name: tensor for tensor in tensors if tensor.fits_grid and tensor.kind in kinds}
        self._names = {key: name for key, name in tensors.names.items() if name in self._probed}
        self.totals = Totals()
        self.layouts = {name: blocks_of(tensor) for name, tensor in self._probed.items()}
        self._otherwise: set[str] = set()  # used by other functions than the watched ones, too
        self._first: list[Tensor] = []
        self._looked_up: list[tuple[str, Tensor]] = []  # in the last run: how often each row of a table
        self._refused: set[str] = set()
        self._pieces = {name: Pieces(tensor) for name, tensor in self._probed.items() if may_be_in_pieces(tensor)}
        for name, tensor in self._probed.items():
            tensor.tensor.requires_grad_(name not in self._pieces)

    def watched(self, run: Callable[[], ResultT]) -> ResultT:
        """What a function returns that runs the model, or a part of it, while every product is watched."""
        while True:
            self._first, self._looked_up = [], []
            for pieces in self._pieces.values():
                pieces.clear()
            for buffer in self._tensors.model.buffers():
                if buffer.grad_fn is not None:
                    buffer.detach_()  # written by the last call, whose graph is gone
            with ProductWatch(self._names, self._tell, gradients=True, through=self._through) as watch:
                found = run()
            self._otherwise |= watch.otherwise
            again = self._pieces.keys() & self._otherwise
            if not again:
                for name, counted in self._looked_up:
                    add_up(self.totals.uses, name, counted)
                return found
            for name in again:  # its gradient comes from more than products: it is taken as a whole
                del self._pieces[name]
                self._probed[name].tensor.requires_grad_(True)

    def along(
        self, outputs: Sequence[Tensor], directions: Sequence[Tensor], *, unseen: bool, also: Sequence[Tensor] = ()
    ) -> tuple[Tensor | None, ...]:
        """Take the gradients of what was watched last, along one direction of its outputs.

        Args:
            outputs: what it computed.
            directions: tensors of their shapes.
            unseen: also keep the moments of this direction apart, in `Sums.unseen`.
            also: other tensors that it was computed from.

        Returns:
            the gradients of these.
        """
        wanted = {name: tensor.tensor for name, tensor in self._probed.items() if name not in self._pieces}
        # The gradients of the model's own inputs come only when asked for: no weight stands before them.
        inputs = [*also, *wanted.values(), *self._first]
        found = torch.autograd.grad(outputs, inputs, directions, allow_unused=True)
        for names, gradients in self._alike(wanted, found[len(also) : len(also) + len(wanted)]):
            self._gather(names, gradients, unseen)
        for name, pieces in self._pieces.items():
            if pieces.any:
                self._gather_pieces(name, pieces, unseen)
            pieces.clear()
        return found[: len(also)]

    def _alike(
        self, wanted: Mapping[str, Tensor], gradients: Sequence[Tensor | None]
    ) -> Iterator[tuple[tuple[str, ...], Tensor]]:
        """The gradients of probed tensors, (tensors, rows, columns); small ones of the same view together."""
        groups: dict[object, list[tuple[str, Tensor]]] = {}
        for name, gradient in zip(wanted, gradients, strict=True):
            if gradient is not None:
                view = self._probed[name].view
                small = view, gradient.dtype, self.layouts[name], self._is_table(name)
                key = small if gradient.numel() <= _SMALL else name
                groups.setdefault(key, []).append((name, view.matrix(gradient)))
        for group in groups.values():
            names, matrices = zip(*group, strict=True)
            yield names, (torch.stack(matrices) if len(matrices) > 1 else matrices[0][None]).float()

    def _is_table(self, name: str) -> bool:
        return name in self.totals.uses and name not in self.totals.noise and name not in self._otherwise

    def _has_moments(self, name: str) -> bool:
        """A table or a bias has no inputs whose errors could make up for each other."""
        return self._wants_moments and not self._is_table(name) and bool(self._probed[name].view.rows)

    def _gather(self, names: tuple[str, ...], gradients: Tensor, unseen: bool) -> None:
        """Add gradients, (tensors, rows, columns), to the sums over their rows and to their second moments."""
        rows = gradients.double().square().sum(2)
        finite = rows.isfinite().all(1)
        if not bool(finite.all()):
            self._refuse({name for name, is_finite in zip(names, finite.tolist(), strict=True) if not is_finite})
            names = tuple(name for name in names if name not in self._refused)
            gradients, rows = gradients[finite], rows[finite]
        if not names:
            return
        add_up(self.totals.rows, names, rows)
        if self._has_moments(names[0]):
            layout = self.layouts[names[0]]
            together = replace(layout, groups=layout.groups * len(names))
            blocks = together.blocks(gradients.flatten(0, 1))
            self._add_moments(names, torch.bmm(blocks.transpose(1, 2), blocks).unflatten(0, (len(names), -1)), unseen)

    def _gather_pieces(self, name: str, pieces: Pieces, unseen: bool) -> None:
        """The same of one weight whose gradient comes in pieces."""
        tensor, layout = self._probed[name], self.layouts[name]
        rows, moments = torch.zeros(tensor.view.n_rows, dtype=torch.float64), None
        for start, gradient in pieces.gradients():
            rows[start : start + len(gradient)] = gradient.double().square_().sum(1).cpu()
            if self._has_moments(name):
                blocks = layout.blocks(gradient)
                if moments is None:
                    moments = torch.zeros(len(blocks), blocks.shape[2], blocks.shape[2], device=blocks.device)
                moments.baddbmm_(blocks.transpose(1, 2), blocks)
        if not bool(rows.isfinite().all()):
            self._refuse({name})
            return
        add_up(self.totals.rows, (name,), rows[None])
        if moments is not None:
            self._add_moments((name,), moments[None], unseen)

    def _add_moments(self, names: tuple[str, ...], moments: Tensor, unseen: bool) -> None:
        add_up(self.totals.moments, names, moments)
        if unseen:
            add_up(self.totals.unseen, names, moments)

    def _refuse(self, names: set[str]) -> None:
        for name in sorted(names - self._refused):  # once is enough
            log.warning("%s: a gradient is not finite, and is left out", name)
        self._refused |= names

    def _tell(self, product: Product) -> None:
        pieces = self._pieces.get(product.tensor)
        if pieces is not None and not pieces.watch(product):
            self._otherwise.add(product.tensor)
        if product.kind == "embedding":
            view = self._probed[product.tensor].view
            if view.rows == (0,):  # where each entry has a step of its own
                counted = torch.bincount(product.x.reshape(-1), minlength=view.n_rows)
                self._looked_up.append((product.tensor, counted.double()))
            if product.y.is_leaf and product.y.requires_grad:
                self._first.append(product.y)
        elif product.x.requires_grad:
            # What a hook holds must not lead back to what it hangs on: such rings keep whole graphs in memory.
            noise, x, by_rows = (
                self.totals.noise.setdefault(product.tensor, Noise()),
                product.x.detach(),
                product.kind == "linear",
            )
            product.x.register_hook(lambda gradient: noise.add(x, gradient, by_rows))
            if product.x.is_leaf:
                self._first.append(product.x)

    def sums(self, rounds: int) -> Sums:
        """What was summed up; see `Totals.sums`."""
        return self.totals.sums(self.layouts, rounds)
