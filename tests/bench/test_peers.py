"""What `make bench-peers` says of results, with made-up ones; and which tools it asks for which model."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from bench.peers import bars, subjects, tables
from bench.peers.families import ALL, FAMILIES, FLOORS, FORMS, wanted
from bench.peers.workers import ours

from bench import front
from pared.runtime.graphs.call_kinds import Argument
from pared.runtime.profile.profile import Profile
from pared.runtime.profile.timings import CallTiming, ModelTiming
from tests.bench import rows

BARS = {bar.what: bar for bar in bars.bars(json.loads(json.dumps(rows.found())))}
PAGE = tables.whole(rows.found())


@pytest.mark.parametrize(
    ("what", "ratio"),
    [
        ("minilm, 8 x 128 tokens", 2.0),
        ("minilm, 1 x 128 tokens", 0.5),
        ("minilm, 1 x 32 tokens", 1.0),
        ("efficientnet, batch 1", None),
        ("geometric mean of 3 of the 7 calls above", 1.0),
        ("worst of 3 of the 7 calls above", 2.0),
        ("smollm2, 32 tokens after 16", 2.0),
        ("minilm: to make it", 3.0),
        ("minilm: a new process, from the files to the first answer", 2.0),
        ("dual_path", None),
    ],
)
def test_a_bar_is_the_ratio_of_times(what: str, ratio: float | None) -> None:
    assert BARS[what].ratio == (None if ratio is None else pytest.approx(ratio))


def test_a_bar_says_what_was_measured() -> None:
    assert BARS["minilm, 8 x 128 tokens"].ours == "pared (in OpenVINO): 40 ms"
    assert BARS["smollm2, 32 tokens after 16"].other == "llamacpp-q8: 1000.0 tokens/s"
    assert BARS["minilm: to make it"].other == "openvino-int8: 4.0 s"


def test_bars_without_any_result_are_empty_lines() -> None:
    assert {bar.ratio for bar in bars.bars({})} == {None}
    assert bars.table({}).count("\n") == len(bars.bars({})) + 1


def test_bold_bars_are_those_that_are_not_slower() -> None:
    lines = bars.table(rows.found()).splitlines()
    assert [line.endswith("** |") for line in lines if line.startswith("| minilm, ")] == [False, True, True]


def test_the_page_names_one_machine_one_date_and_one_command() -> None:
    about = PAGE.split("\n\n")[0]
    assert "| machine | Abacus, 2 cores, 24 GiB, BEADS, Python 3.11.7, 2 threads |" in about
    assert "| date | 2026-11-30 |" in about
    assert "`make bench-peers MODELS=minilm,smollm2`" in about


def test_the_page_marks_the_form_that_fit_chose_and_keeps_what_failed() -> None:
    assert "| **pared** (in OpenVINO) | **20.00 (0.200)** | 12.0 |" in PAGE
    assert "| **pared-layers** | 20.00 (0.200) | - |" in PAGE
    assert "* bf16, error: `judge: RuntimeError: no 'mul'`" in PAGE
    assert "| bf16 | - | - |" in PAGE


def test_the_picture_reads_the_page() -> None:
    minilm, smollm2 = front.panels(PAGE)
    assert (minilm.model, minilm.call, minilm.megabytes) == ("MiniLM", "8 x 128 tokens", 100.0)
    chosen = next(point for point in minilm.points if point.peer == "pared")
    assert chosen == front.Point("pared", 0.4, 0.01, 0.2, "in OpenVINO")
    assert {point.peer for point in smollm2.points} == {"llamacpp-q8", "pared"}  # the chosen form is not drawn twice


def test_decibels_are_drawn_as_lost_energy() -> None:
    page = PAGE.replace("| 1 - cos |", "| SQNR, dB |").replace("| 0.01 |", "| 20 |")
    minilm = front.panels(page)[0]
    assert minilm.loss == "lost share of the output's energy"
    assert {point.loss for point in minilm.points} == {0.01}


@pytest.mark.parametrize("mode", front.THEMES)
@pytest.mark.parametrize(("models", "count"), [((), 2), (("MiniLM",), 1)])
def test_the_picture_is_svg_with_a_panel_for_each_model(mode: str, models: tuple[str, ...], count: int) -> None:
    root = ElementTree.fromstring(front.picture(PAGE, front.THEMES[mode], models))
    texts = ["".join(text.itertext()) for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert sum("(FP32: " in text for text in texts) == count
    assert "pared, in OpenVINO" in texts


def test_the_area_of_a_circle_is_proportional_to_the_size() -> None:
    drawn = front.picture(PAGE, front.THEMES["light"], ["MiniLM"])
    radius = round(front.RADIUS * math.sqrt(0.2), 1)
    assert drawn.count(f" r='{radius}'") == 2  # ours, in two forms


@pytest.mark.parametrize("subject", subjects.NAMES)
def test_the_usual_peers_are_the_floors_the_tools_and_each_form(subject: str) -> None:
    peers = [peer for _, peer in wanted([], subject)]
    assert {*FLOORS, *FORMS, "ort-static", "openvino-int8", "pared"} <= set(peers)
    assert ("llamacpp-q8" in peers) == (subject == "smollm2")
    assert peers.index("pared") < min(peers.index(form) for form in FORMS)  # which use its files


def test_peers_are_found_by_family_by_name_and_all() -> None:
    assert [peer for _, peer in wanted(["quanto", "ort-fp32"], "minilm")] == [
        *FLOORS,
        "quanto-w8",
        "quanto-w4",
        "ort-fp32",
    ]
    everything = [peer for family in FAMILIES.values() for peer in family.peers]
    assert [peer for _, peer in wanted([ALL], "smollm2")] == everything


def _profile(call: CallTiming) -> Profile:
    return Profile({}, model=ModelTiming((call,)))


CALL = CallTiming((Argument("x", "float32", (2, 3)),), 10.0, 9.0, 8.0, 5.0, openvino_ms=3.0)


@pytest.mark.parametrize(
    ("field", "form"), [("modules_ms", "layer by layer"), ("graph_ms", "as a graph"), ("openvino_ms", "in OpenVINO")]
)
def test_a_profile_that_prefers_a_form_runs_in_it(field: str, form: str) -> None:
    for call in (CALL, replace(CALL, float32_ms=1.0), replace(CALL, bfloat16_ms=0.5)):
        changed = ours.preferring(_profile(call), field)
        assert ours.form_of(changed) == form
        assert ours.form_of(Profile.from_json(changed.to_json())) == form


def test_calls_of_several_sizes_may_run_in_several_forms() -> None:
    small = replace(CALL, arguments=(Argument("x", "float32", (1, 3)),), graph_ms=1.0)
    assert ours.form_of(Profile({}, model=ModelTiming((CALL, small)))) == "in OpenVINO and as a graph"


def test_a_form_that_was_not_timed_is_an_error_that_says_why() -> None:
    call = replace(CALL, graph_ms=None, because="no graph: it branches")
    with pytest.raises(ValueError, match="there is no such form: no graph: it branches"):
        ours.preferring(_profile(call), "graph_ms")


@pytest.mark.parametrize(
    ("call", "form"),
    [
        (CALL, "in OpenVINO"),
        (replace(CALL, openvino_ms=None), "as a graph"),
        (replace(CALL, graph_ms=None, openvino_ms=None), "layer by layer"),
        (replace(CALL, float32_ms=1.0, bfloat16_ms=None), "in float32"),
        (replace(CALL, bfloat16_ms=1.0), "in bfloat16"),
    ],
)
def test_the_form_of_a_profile(call: CallTiming, form: str) -> None:
    assert ours.form_of(_profile(call)) == form
