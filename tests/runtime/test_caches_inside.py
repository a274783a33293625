"""Caches that stay in OpenVINO: whatever a caller does with its own cache, the next step is that of the modules."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bench.calls import kinds_noted
from torch import Tensor, nn

from pared.errors import ModelError
from pared.runtime import float_forms
from pared.runtime.graphs.capturing import capture as capturing
from pared.runtime.graphs.containers import container_of, renewed
from pared.runtime.openvino.caches import session as sessions
from pared.runtime.openvino.graph import OpenVinoGraph
from pared.switches import ignoring
from tests.runtime.generators import MODELS, OTHER, PROMPT, near, quantized, served, steps

pytestmark = [pytest.mark.slow, pytest.mark.engine]


def graph_of(server: Any) -> OpenVinoGraph:
    """That of the steps."""
    (found,) = (one.graph for one in server._graphs.values() if one.graph is not None and one.graph.parts.inside)
    assert isinstance(found, OpenVinoGraph)
    return found


@pytest.fixture(name="copied")
def _copied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens were copied into OpenVINO, each time."""
    found: list[int] = []
    plain = sessions._Texts.load

    def noted(self: Any, past: Any) -> None:
        found.append(past[0].shape[-2])
        plain(self, past)

    monkeypatch.setattr(sessions._Texts, "load", noted)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_only_what_is_new_is_read(name: str, copied: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "_LEAST_ROOM", 3)  # so that the room has to grow
    q = quantized(name)
    expected, theirs = steps(q, PROMPT, 20)
    with served(q, "openvino", lambda q: steps(q, PROMPT, 4)):
        steps(q, PROMPT, 4)  # which compares the graphs with the modules
        copied.clear()
        found, ours = steps(q, PROMPT, 20)
    assert copied == [PROMPT.shape[1]]
    assert near(found, expected)
    held, wanted = container_of(ours), container_of(theirs)
    assert held is not None
    assert wanted is not None
    assert all(near(held.tensors[part], wanted.tensors[part]) for part in wanted.tensors)


def written(cache: Any) -> Any:
    with torch.no_grad():
        cache.layers[0].keys[..., 1, :] = 0.25
    return cache


def cropped(cache: Any) -> Any:
    cache.crop(-3)
    return cache


def reordered(cache: Any) -> Any:
    cache.reorder_cache(torch.tensor([0]))
    return cache


CHANGES: dict[str, Callable[[Any], Any]] = {
    "written to": written,
    "cropped": cropped,
    "reordered": reordered,
    "copied": copy.deepcopy,
    "of the same tensors": renewed,
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_cache_is_read_as_it_is(change: str, copied: list[int]) -> None:
    q = quantized("llama")

    def use(q: nn.Module) -> list[Tensor]:
        _, first = steps(q, PROMPT, 8)
        before = copy.deepcopy(first)
        other = CHANGES[change](first)
        found = [steps(q, OTHER[:, :1], 5, one)[0] for one in (other, before)]
        return [*found, steps(q, PROMPT[:, :1], 3, other)[0]]

    expected = use(q)
    with served(q, "openvino", lambda q: steps(q, PROMPT, 4)):
        steps(q, PROMPT, 4)
        copied.clear()
        found = use(q)
    assert all(map(near, found, expected))
    # After the prompt, after the change, and for what it was before.
    assert len(copied) == 3 - (change == "of the same tensors")


def test_more_texts_than_are_kept(copied: list[int]) -> None:
    q = quantized("llama")
    prompts = [torch.tensor([[i + 1, 7, 30 + i]]) for i in range(sessions._MOST_TEXTS + 1)]

    def use(q: nn.Module) -> list[Tensor]:
        caches = [steps(q, prompt, 2)[1] for prompt in prompts]
        turns = [*zip(prompts, caches, strict=True)] * 3
        return [steps(q, prompt[:, :1], 1, one)[0] for prompt, one in turns]

    expected = use(q)
    with served(q, "openvino", lambda q: steps(q, PROMPT, 4)) as server:
        found = use(q)
        session: Any = graph_of(server)._sessions.here()
        assert len(session._texts) == sessions._MOST_TEXTS
    assert all(map(near, found, expected))


def test_a_cache_that_is_dropped_leaves_its_place() -> None:
    q = quantized("llama")
    with served(q, "openvino", lambda q: steps(q, PROMPT, 4)) as server:
        for _ in range(3):
            steps(q, PROMPT, 3)
        session: Any = graph_of(server)._sessions.here()
        before = len(session._texts)
        steps(q, OTHER, 3)
        assert len(session._texts) == before
        assert all(texts.room is None for texts in session._texts)


def test_what_was_compiled_in_another_process_keeps_caches_too() -> None:
    q = quantized("llama")
    expected, _ = steps(q, PROMPT, 8)
    with served(q, "openvino", lambda q: steps(q, PROMPT, 4)) as server:
        steps(q, PROMPT, 4)
        graph = graph_of(server)
        with ignoring():  # torch's warning about its own classes
            parts = pickle.loads(pickle.dumps(graph.parts))
        again = OpenVinoGraph.again(parts, torch.get_num_threads(), graph.compiled(), lambda: graph)
        for one in server._graphs.values():
            one.graph = again if one.graph is graph else one.graph
        found, _ = steps(q, PROMPT, 8)
        assert parts.inside == graph.parts.inside
        assert isinstance(again._sessions.here(), sessions.CachedSession)
    assert near(found, expected)


def test_a_step_is_captured_for_all_lengths_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    q = quantized("llama")
    with kinds_noted(q) as seen:
        steps(q, PROMPT, 3)
    (step,) = (call for kind, call in seen.items() if any("own.0.keys" in one.name for one in call))
    skeleton = float_forms.outline_of(q)
    slow = ["it is known that other calls take too long"] * 2
    found = capturing.capture(skeleton, step, slow)
    assert found.note == ""
    assert all(sizes[2].fixed is None for sizes in found.inputs.values() if len(sizes) == 4)
    (attempt,) = capturing._STEP
    monkeypatch.setattr(capturing, "_STEP", (type(attempt)(attempt.free, 0.0, 0.0),))
    with pytest.raises(ModelError, match="took"):
        capturing.capture(float_forms.outline_of(q), step)
