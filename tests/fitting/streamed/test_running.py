"""What is in memory while blocks run, and what is said of blocks that raise something or do not do the same twice."""

from __future__ import annotations

import errno
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pared.errors import CalibrationError, FileError
from pared.files import disk
from pared.fitting.config import PostTrainingQuantConfig
from pared.fitting.streamed import store
from pared.fitting.streamed.fit import fit_folder
from pared.fitting.streamed.parts.blocks import NotInBlocks
from pared.fitting.streamed.parts.chain import Chain
from pared.fitting.streamed.parts.running import running
from pared.fitting.streamed.sweeps import Sweeps
from tests.fitting.streamed.models import small, some_calls, sweeps_of, written

BATCHES = [dict(call.kwargs) for call in some_calls(3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(small("Llama", layers=3), tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(name="sweeps", params=["bfloat16", "float32"])
def _sweeps(folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Sweeps]:
    with sweeps_of(folder, tmp_path / "work", some_calls(3), dtype=request.param) as found:
        yield found


def forward(sweeps: Sweeps) -> None:
    sweeps.start()
    sweeps.enter()
    for number in range(len(sweeps.blocks)):
        sweeps.forward(number)


def backward(sweeps: Sweeps) -> None:
    sweeps.top()
    for number in reversed(range(len(sweeps.blocks))):
        sweeps.backward(number)
    sweeps.outside()


def instead(sweeps: Sweeps, place: str, change: Callable[[int, Tensor], Tensor]) -> None:
    """Let a module of the model, which does not run as a block, give something else in its n-th call."""
    module = sweeps.weights.tensors.model.get_submodule(place)
    own, calls = module.forward, [0]

    def changed(*args: Any, **kwargs: Any) -> Tensor:
        calls[0] += 1
        return change(calls[0], own(*args, **kwargs))

    module.__dict__["forward"] = changed


def raising(when: int) -> Callable[[int, Tensor], Tensor]:
    def change(number: int, output: Tensor) -> Tensor:
        if number == when:
            raise ValueError("no")
        return output

    return change


class Broken(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, given: Tensor) -> Tensor:
        return given.clone()

    @staticmethod
    def backward(_ctx: Any, *_: Tensor) -> Tensor:
        raise ValueError("no gradient")


def broken(_: int, output: Tensor) -> Tensor:
    return Broken.apply(output)  # type: ignore[no-untyped-call]  # as torch has it


@pytest.mark.parametrize("sweeps", ["float32"], indirect=True)
@pytest.mark.parametrize(
    ("place", "call", "where"),
    [
        ("model.embed_tokens", 3, "batch 1"),  # learning, and batch 0
        ("model.embed_tokens", 6, "batch 1"),  # and once more, without anything else
        ("model.layers.1.mlp", 2, "batch 1, block 1"),
    ],
)
def test_what_a_part_raises_names_batch_and_block(sweeps: Sweeps, place: str, call: int, where: str) -> None:
    instead(sweeps, place, raising(call))
    with pytest.raises(CalibrationError, match=f"^calibration: {where}: the model raised ValueError: no"):
        forward(sweeps)


@pytest.mark.parametrize("sweeps", ["float32"], indirect=True)
def test_what_the_head_raises_names_the_batch(sweeps: Sweeps) -> None:
    forward(sweeps)
    instead(sweeps, "lm_head", raising(3))
    with pytest.raises(CalibrationError, match="^calibration: batch 2: the model raised ValueError: no"):
        backward(sweeps)


@pytest.mark.parametrize("sweeps", ["float32"], indirect=True)
@pytest.mark.parametrize(
    ("place", "where"),
    [("lm_head", "batch 0"), ("model.layers.1.mlp", "batch 0, block 1"), ("model.embed_tokens", "batch 0")],
)
def test_what_has_no_gradient_is_not_in_blocks(sweeps: Sweeps, place: str, where: str) -> None:
    forward(sweeps)
    instead(sweeps, place, broken)
    with pytest.raises(NotInBlocks, match=rf"has no gradient \(calibration: {where}\): ValueError: no gradient"):
        backward(sweeps)


UNLIKE: dict[str, Callable[[int, Tensor], Tensor]] = {
    "counts": lambda number, output: output * (1 + number / 4),
    "dropout": lambda _, output: nn.functional.dropout(output, 0.1, training=True),
}


@pytest.mark.parametrize("what", UNLIKE)
@pytest.mark.parametrize("number", [1, 2])
def test_a_block_that_does_not_do_the_same_twice_is_refused(sweeps: Sweeps, what: str, number: int) -> None:
    instead(sweeps, f"model.layers.{number}.mlp", UNLIKE[what])
    forward(sweeps)
    with pytest.raises(NotInBlocks, match=f"block {number} does not give the same twice"):
        backward(sweeps)


def test_a_block_that_does_the_same_twice_is_not_refused(sweeps: Sweeps) -> None:
    forward(sweeps)
    backward(sweeps)


def test_hidden_states_are_in_memory_for_one_call_at_a_time(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def watched(name: str) -> None:
        own = getattr(Chain, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            alive.append(sum(one() is not None for one in made))
            found = own(*args, **kwargs)
            made.append(weakref.ref(found[0] if isinstance(found, tuple) else found))
            return found

        monkeypatch.setattr(Chain, name, run)

    for name in ("start", "entering", "block"):
        watched(name)
    with sweeps_of(folder, tmp_path / "work", some_calls(9)) as sweeps:
        forward(sweeps)
    assert len(made) == 9 * (2 + len(sweeps.blocks))
    assert max(alive) == 1


@pytest.mark.parametrize(
    ("file", "doing"),
    [("entering-0000-00", "running what comes before the blocks"), ("gradient-0002-00", "measuring errors")],
)
def test_a_full_disk_is_told_with_what_is_needed(
    folder: Path, tmp_path: Path, file: str, doing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, write: Any, **options: Any) -> None:
        if path.stem == file:
            raise OSError(errno.ENOSPC, "No space left on device")
        disk.write_atomic(path, write, **options)

    monkeypatch.setattr(store, "write_atomic", full)
    conf = PostTrainingQuantConfig(approach="weight_only")
    with pytest.raises(FileError, match=f"the disk is full while {doing}: about [0-9,]+ bytes are needed"):
        fit_folder(folder, conf, BATCHES, tmp_path / "work", tmp_path / "out", quiet=True)


def test_what_a_function_does_to_the_model_is_undone(sweeps: Sweeps) -> None:
    call = some_calls(1)[0]

    def answer() -> Tensor:
        with running(sweeps.weights, sweeps.blocks) as model, torch.no_grad():
            logits: Tensor = model(**call.kwargs).logits
        return logits

    before = answer()
    with running(sweeps.weights, sweeps.blocks) as model:
        model.train()
        model.register_forward_hook(lambda *_: None)
        model.get_submodule(sweeps.blocks.names[0]).register_forward_pre_hook(lambda _, args: (args[0] + 1, *args[1:]))
    assert not any(module.training for module in sweeps.weights.tensors.model.modules())
    assert torch.equal(answer(), before)
