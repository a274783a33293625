"""Gradients of large weights in pieces: the same sums as of whole gradients."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pared.fitting.calibration import observe, sensitivity
from pared.fitting.calibration.gathering import pieces
from pared.model.tensors import find_tensors


class Language(nn.Module):
    """A small language model whose table is its head as well, or is used as a matrix by other functions, too."""

    def __init__(self, tied: bool, otherwise: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(60, 16, padding_idx=3)
        self.middle = nn.Linear(16, 16)
        self.head = nn.Linear(16, 60, bias=False)
        self.otherwise = otherwise
        if tied:
            self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = F.gelu(self.middle(self.table(tokens)))
        logits: Tensor = self.head(hidden)
        return logits + hidden @ self.table.weight.T if self.otherwise else logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("otherwise", [False, True])
def test_pieces_make_the_whole(monkeypatch: pytest.MonkeyPatch, tied: bool, otherwise: bool) -> None:
    torch.manual_seed(0)
    model = Language(tied, otherwise).eval()
    with torch.no_grad():
        model.table.weight.normal_()
    calls = [torch.randint(0, 60, (2, 9)) for _ in range(5)]
    seen = observe.collect(model, calls, 100)
    tensors = find_tensors(model)
    whole = sensitivity.measure(tensors, seen.calls, seen.energies, 0)
    monkeypatch.setattr(pieces, "LARGE", 300)  # the table and the head, not what is between them
    monkeypatch.setattr(pieces, "_AT_ONCE", 7 * 16)  # rows that do not divide the table
    made: list[int] = []
    monkeypatch.setattr(pieces.Pieces, "gradients", _counted(pieces.Pieces.gradients, made))
    apart = sensitivity.measure(tensors, seen.calls, seen.energies, 0)
    assert whole is not None
    assert apart is not None
    assert bool(made) != (tied and otherwise)
    assert apart.tensors.keys() == whole.tensors.keys()
    for name, one in whole.tensors.items():
        other = apart.tensors[name]
        torch.testing.assert_close(other.rows, one.rows, rtol=1e-4, atol=1e-12)
        for ours, theirs in ((other.moments, one.moments), (other.unseen, one.unseen), (other.uses, one.uses)):
            assert (ours is None) == (theirs is None), name
            if ours is not None and theirs is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
    assert apart.inputs.keys() == whole.inputs.keys()


Gradients = Callable[[pieces.Pieces], Iterator[tuple[int, Tensor]]]


def _counted(function: Gradients, made: list[int]) -> Gradients:
    def counted(self: pieces.Pieces) -> Iterator[tuple[int, Tensor]]:
        made.append(1)
        return function(self)

    return counted
