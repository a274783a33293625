"""`engine.json` and the signature of an export may come from anyone: what stands there is refused, or does no harm."""

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pared
from pared.errors import ConfigError, CorruptError
from pared.runtime.graphs.call_kinds import Argument
from pared.runtime.onnx.signature import ExportedArgument, GraphInput, Signature, describe
from pared.runtime.profile.profile import ENGINE_FILE, Profile, profile_beside, this_machine
from pared.runtime.profile.timings import CallTiming, ModelTiming, Timing
from pared.runtime.serving.graph_server import GraphServer

HOSTILE: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**70, 10**400, 1e308, -1e-320, "", "float32", "__name__", "\ud800", "x" * 10_000),
    *([], [1], [[]], {}, {"a": {}}, [2**62, 2**62]),
)
CALL = CallTiming(
    (
        Argument("cache", holds="DynamicCache(1, filled)"),
        *(Argument(f"cache.own.0.{kind}", "float32", (2, 3, 5, 8)) for kind in ("keys", "values")),
        Argument("input", "float32", (2, 8)),
        Argument("scale", value=2.0),
    ),
    *(3.0, 2.5, 1.0, 0.5),
)
PROFILE = Profile(
    this_machine(), {"0": Timing((2, 8), 3.0, 2.0, 1.0, "no int8")}, ModelTiming((CALL,)), {"0": ModelTiming((CALL,))}
)


def changed(data: Any) -> Iterator[Any]:
    """The same data with something hostile in each place, with each key missing, and with one too many."""
    for path in places(data):
        for value in HOSTILE:
            yield put(data, path, value)
        if path and isinstance(path[-1], str):
            found = put(data, path, None)
            del inside(found, path[:-1])[path[-1]]
            yield found
        if isinstance(inside(data, path), dict):
            yield put(data, (*path, "other"), 1)


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    pairs = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in pairs:
        yield from places(value, (*path, key))


def inside(data: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        data = data[key]
    return data


def put(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    found = copy.deepcopy(data)
    inside(found, path[:-1])[path[-1]] = value
    return found


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()


def test_a_profile_is_read_or_refused() -> None:
    assert Profile.from_json(PROFILE.to_json()) == PROFILE
    refused = 0
    for data in changed(json.loads(PROFILE.to_json())):
        try:
            found = Profile.from_json(json.dumps(data))
        except CorruptError:
            refused += 1
            continue
        found.summary()  # whatever is believed can be used
        assert found.running("0").kernel in ("int8", "bfloat16", "float32")
        assert hash(found.model.served) is not None
    assert refused > 500


def test_a_call_that_fails_in_the_modules_leaves_the_other_times_readable() -> None:
    call = CallTiming((), 2.0, None, None, 1.0, "quantized by layers: IndexError")
    profile = Profile(PROFILE.machine, PROFILE.layers, ModelTiming((call,)))
    assert Profile.from_json(profile.to_json()) == profile


def test_a_profile_of_a_version_without_reasons_is_read() -> None:
    data = json.loads(PROFILE.to_json())
    for timing in (*data["layers"].values(), *data["calls"][""]):
        del timing["because"]
    assert Profile.from_json(json.dumps(data)).layers.keys() == PROFILE.layers.keys()


def test_no_profile_makes_load_capture_for_hours() -> None:
    for calls in ([CALL] * 1000, [replace(CALL, arguments=(Argument("x", "float32", (2, 8)),) * 20_000)]):
        for text in (replace(PROFILE, model=ModelTiming(tuple(calls))).to_json(), json.dumps(spread(calls))):
            with pytest.raises(CorruptError, match="far more calls than are ever timed"):
                Profile.from_json(text)


def spread(calls: list[CallTiming]) -> Any:
    """A profile with these calls, each of another submodel."""
    submodels = {str(number): ModelTiming((call,)) for number, call in enumerate(calls)}
    return json.loads(replace(PROFILE, submodels=submodels).to_json())


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"\xff", b"[" * 200_000, b"null", b'{"machine": {}, "machine": {}}', b" " * (1 << 25)),
        *(b'{"machine": {}, "layers": {}, "calls": NaN}', b"1" * 10_000),
    ],
    ids=lambda content: repr(content[:12]),
)
def test_what_is_no_profile_is_a_warning(content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = pared.save(pared.fit(net(), quiet=True), tmp_path)
    (tmp_path / ENGINE_FILE).write_bytes(content)
    assert profile_beside(path) == Profile(this_machine())
    assert caplog.text.count("every layer that may run in int8 will") == 1
    assert pared.load(tmp_path, model=net())(torch.ones(2, 8)).shape == (2, 4)


def test_a_file_does_not_decide_how_much_the_first_call_takes() -> None:
    """The recorded example of a call is captured only if it is not far larger than the call at hand."""
    given = (Argument("x", "float32", (2, 8)),)
    for shape, is_used in (((64, 8), True), ((1 << 20, 8), True), ((1 << 24, 8), False), ((1 << 40, 1), False)):
        wanted = (Argument("x", "float32", shape),)
        server = GraphServer(lambda _: net(), [wanted])
        kind = tuple(argument.kind for argument in wanted)
        assert server._example(kind, given) == (wanted if is_used else None)


SIGNATURE = Signature(
    (ExportedArgument("x", ("x",)), ExportedArgument("pair", ("pair_0", "pair_1")), ExportedArgument("n", (), "3")),
    ("x", "pair", "n"),
    describe({"a": torch.zeros(1), "b": (None, [torch.zeros(1)], 2.5)}),
    {name: GraphInput("float32", ("batch", 8), (2, 8), -1.0, 1.0) for name in ("x", "pair_0", "pair_1")},
)


def test_a_signature_is_read_or_refused() -> None:
    assert Signature.from_json(SIGNATURE.to_json()) == SIGNATURE
    refused = 0
    for data in changed(json.loads(SIGNATURE.to_json())):
        try:
            found = Signature.from_json(json.dumps(data))
            found.check("model.onnx")
        except CorruptError:
            refused += 1
            continue
        try:
            found.sample()
        except ConfigError:
            continue
        found.rebuild([torch.zeros(1)] * found.n_outputs)
    assert refused > 500


@pytest.mark.parametrize("text", ["", "[" * 200_000, "[]", '{"a": 1}', "1" * 10_000])
def test_what_is_no_signature_is_told(text: str) -> None:
    with pytest.raises(CorruptError):
        Signature.from_json(text)


def test_outputs_nested_without_end_are_refused() -> None:
    structure: Any = 0
    for _ in range(60):
        structure = {"list": [structure]}
    data = json.loads(SIGNATURE.to_json()) | {"outputs": structure}
    with pytest.raises(CorruptError, match="nested more than 50 deep"):
        Signature.from_json(json.dumps(data))


@pytest.mark.parametrize("value", ["(" * 5000, "1" * 20_000, "[" * 90 + "]" * 90, "__import__('os')", "'a' * 10**9"])
def test_values_are_parsed_within_bounds(value: str) -> None:
    signature = Signature((ExportedArgument("n", (), value),), ("n",), 0)
    try:
        assert signature.sample() is not None
    except ConfigError as error:
        assert error.where == "n"  # noqa: PT017  # one or the other


def test_a_sample_is_no_larger_than_can_be_tried() -> None:
    signature = Signature(
        (ExportedArgument("x", ("x",)),), ("x",), 0, {"x": GraphInput("int8", ("n",), (1 << 40,), 0.0, 1.0)}
    )
    with pytest.raises(ConfigError, match="too many to try"):
        signature.sample()


def test_a_mask_may_have_an_infinite_range() -> None:
    mask = GraphInput("float32", (2,), (2,), float("-inf"), 0.0)
    signature = Signature((ExportedArgument("mask", ("mask",)),), ("mask",), 0, {"mask": mask})
    again = Signature.from_json(signature.to_json())
    assert again == signature
    (sampled,), _ = again.sample()
    assert torch.isfinite(sampled).all()
