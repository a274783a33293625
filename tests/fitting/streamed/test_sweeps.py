"""Block by block, the two sweeps find what the pass over the whole model finds."""

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pared.executors.executor import InputT, LocalExecutor, ResultT, Task
from pared.fitting.calibration import observe, sensitivity
from pared.fitting.calibration.gathering import pieces
from pared.fitting.calibration.logits import find_logits
from pared.fitting.calibration.orientation import oriented
from pared.fitting.calibration.sensitivity import Sensitivity, TensorStats
from pared.fitting.experts.balancing import balanced
from pared.fitting.experts.counting import routed
from pared.fitting.experts.finding import mixtures
from pared.fitting.hugging_face.loading import model_in
from pared.fitting.inputs.moments import input_moments, with_inputs
from pared.fitting.streamed.shards.runs import shards_of
from pared.model.calls import Call
from pared.model.tensors import find_tensors
from tests.fitting.streamed.models import small, some_calls, sweeps_of, written

Found = dict[str, TensorStats]


def swept(folder: Path, workspace: Path, calls: list[Call], **options: Any) -> Found:
    """What both sweeps find of all tensors."""
    with sweeps_of(folder, workspace, calls, **options) as sweeps:
        sweeps.start()
        sweeps.enter()
        for number in range(len(sweeps.blocks)):
            sweeps.forward(number)
        sweeps.top()
        found: Found = {}
        for number in reversed(range(len(sweeps.blocks))):
            found |= measured(sweeps.backward(number).sensitivity)
        return found | measured(sweeps.outside().sensitivity)


def measured(found: Sensitivity | None) -> Found:
    assert found is not None
    return dict(found.tensors)


def whole(folder: Path, calls: list[Call]) -> Found:
    """What the pass over the whole model finds."""
    model = model_in(folder)
    seen = observe.collect(model, [dict(call.kwargs) for call in calls], 100)
    paths = {path for path, *_ in seen.energies}
    seen = replace(seen, logits=find_logits(model, seen.calls[0], "auto", paths))
    tensors = oriented(find_tensors(model), seen.calls)
    found = sensitivity.measure(tensors, seen.calls, seen.energies, 0)
    assert found is not None
    experts = mixtures(tensors)
    found = balanced(found, tensors, experts, routed(tensors, experts, seen.calls))
    return measured(with_inputs(found, input_moments(tensors, seen.calls)))


def assert_same(ours: Found, theirs: Found) -> None:
    assert ours.keys() == theirs.keys()
    for name, one in theirs.items():
        other = ours[name]
        torch.testing.assert_close(other.rows, one.rows, rtol=1e-3, atol=1e-6 * float(one.rows.max()), msg=name)
        assert other.layout == one.layout
        parts = ("moments", "unseen", "uses", "tokens", "inputs")
        for a, b in ((getattr(other, part), getattr(one, part)) for part in parts):
            assert (a is None) == (b is None), name
            if a is not None and b is not None:
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()), msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "tied", "count"),
    [
        ("Llama", False, 5),
        ("Qwen2", True, 3),
        ("GPT2", True, 2),
        ("Gemma2", True, 2),
        ("Mixtral", False, 5),
        ("Qwen2Moe", False, 3),
        ("Llava", False, 2),
        ("Jamba", True, 2),
    ],
)
def test_sweeps_find_what_the_whole_pass_finds(tmp_path: Path, kind: str, tied: bool, count: int) -> None:
    folder = written(small(kind, tied=tied), tmp_path / "model", shards=kind == "Llama")
    calls = some_calls(count)
    assert_same(swept(folder, tmp_path / "work", calls), whole(folder, calls))


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_large_tables_have_gradients_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    folder = written(small("Llama", tied=tied, layers=2), tmp_path / "model")  # a table of its own stays on the disk
    calls = some_calls(3)
    expected = whole(folder, calls)
    monkeypatch.setattr(pieces, "LARGE", 500)
    assert_same(swept(folder, tmp_path / "work", calls), expected)


@pytest.mark.slow
def test_states_that_are_computed_again_change_nothing(tmp_path: Path) -> None:
    folder = written(small("Llama"), tmp_path / "model", dtype=torch.bfloat16)
    calls = some_calls(3)
    every = swept(folder, tmp_path / "all", calls, dtype="bfloat16")
    some = swept(folder, tmp_path / "some", calls, dtype="bfloat16", every=3)
    assert all(torch.equal(every[name].rows, some[name].rows) for name in every)
    exact = swept(folder, tmp_path / "exact", calls)
    for name, one in exact.items():  # what is lost on the disk is little beside what is measured
        ratio = float(every[name].rows.sum() / one.rows.sum())
        assert 0.8 < ratio < 1.25, name


class Apart(LocalExecutor):
    """A task for each shard, as with workers; what is sent to them and back is pickled."""

    workers = 2

    def map(self, task: Task[InputT, ResultT], inputs: Sequence[InputT]) -> Iterator[ResultT]:
        for one in inputs:
            run = pickle.loads(pickle.dumps(task.run))
            yield pickle.loads(pickle.dumps(run(one)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Llama", "Mixtral"])
def test_shards_that_are_run_apart_change_no_bit(kind: str, tmp_path: Path) -> None:
    folder = written(small(kind), tmp_path / "model")
    calls = some_calls(13)
    assert [len(one) for one in shards_of(len(calls))] == [4, 4, 5]
    together = swept(folder, tmp_path / "together", calls)
    apart = swept(folder, tmp_path / "apart", calls, executor=Apart())
    assert apart.keys() == together.keys()
    for name, one in together.items():
        for part in ("rows", "moments", "unseen", "uses", "tokens", "inputs"):
            a, b = getattr(apart[name], part), getattr(one, part)
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b), (name, part)
