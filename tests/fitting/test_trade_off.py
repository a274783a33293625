"""The trade-off curve: its points, and what is drawn of them."""

import json
import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pared import AccuracyCriterion, ConfigError
from pared.artifact.outcome import Curve, Point
from pared.fitting.search.maker import OperatingPoint
from pared.fitting.search.search import Judge
from pared.fitting.search.trade_off import trace
from pared.inspection.page import charts
from tests.fitting.fakes import Synthetic, damage_of

SVG = "{http://www.w3.org/2000/svg}"


def score(model: nn.Module) -> float:
    return 0.8 - damage_of(model)


def test_without_a_judge_nothing_is_built() -> None:
    compressor = Synthetic()
    curve = trace(compressor)
    assert compressor.built == []
    assert curve.baseline is None
    assert len(curve.points) == 8
    assert [point.nbytes for point in curve.points] == [compressor.nbytes(point.damage) for point in curve.points]


def test_damages_are_evenly_spaced_and_bytes_fall() -> None:
    curve = trace(Synthetic(), points=5, span=(1e-6, 1e-2))
    assert [point.damage for point in curve.points] == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2])
    sizes = [point.nbytes for point in curve.points]
    assert sizes == sorted(sizes, reverse=True)


def test_a_judge_scores_every_point_and_the_float_model() -> None:
    curve = trace(Synthetic(), Judge(AccuracyCriterion(), score), points=3)
    assert curve.baseline == 0.8
    assert [point.score for point in curve.points] == [0.8 - point.damage for point in curve.points]


def test_the_span_is_kept_within_what_the_compressor_reaches() -> None:
    curve = trace(Synthetic(least=1e-3, most=1e-2))
    assert [curve.points[0].damage, curve.points[-1].damage] == pytest.approx([1e-3, 1e-2])
    assert len(trace(Synthetic(least=0.2)).points) == 1


def test_equal_plans_are_one_point() -> None:
    class Coarse(Synthetic):
        def at_damage(self, damage: float) -> OperatingPoint:
            return super().at_damage(10.0 ** math.floor(math.log10(damage) + 1e-9))

    assert len(trace(Coarse(), points=20, span=(1e-4, 1e-2)).points) == 3


@pytest.mark.parametrize(("points", "span"), [(0, (1e-5, 0.1)), (8, (0.0, 0.1)), (8, (0.2, 0.1))])
def test_what_makes_no_curve(points: int, span: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match=f"{points} points between damages .* make no curve"):
        trace(Synthetic(), points=points, span=span)


@pytest.mark.parametrize(("place", "left"), [(2, None), (3, 1), (4, 2)])
def test_ctrl_c_leaves_the_points_so_far(place: int, left: int | None) -> None:
    calls = []

    def interrupted(model: nn.Module) -> float:
        calls.append(model)
        if len(calls) == place:
            raise KeyboardInterrupt
        return 1.0

    judge = Judge(AccuracyCriterion(), interrupted)
    if left is None:
        with pytest.raises(KeyboardInterrupt):
            trace(Synthetic(), judge)
    else:
        assert len(trace(Synthetic(), judge).points) == left


def test_json_is_plain_and_complete() -> None:
    curve = trace(Synthetic(), Judge(AccuracyCriterion(), score), points=3)
    assert Curve.from_json(json.loads(json.dumps(curve.to_json()))) == curve


def test_the_table_names_every_point() -> None:
    curve = Curve((Point(1e-9, 1e-4, 2_000_000, 0.79, 12.3), Point(1e-8, 1e-3, 1_500_000, 0.7)), 0.8)
    lines = str(curve).splitlines()
    assert len(lines) == 5
    assert lines[2].split() == ["2,000,000", "0.0001", "1e-09", "0.79", "12.3"]
    assert lines[4].split() == ["float", "model", "0", "0.8"]
    assert max(map(len, lines)) <= 100


def drawn(curve: Curve) -> str:
    return charts.trade_off(curve.points, curve.baseline).standalone()


sizes = st.integers(1, 10**12)
scores = st.floats(-1e6, 1e6)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(sizes, st.floats(1e-12, 1.0), scores), min_size=1, max_size=12), scores)
@pytest.mark.slow
def test_every_point_is_drawn_inside_the_picture(rows: list[tuple[int, float, float]], baseline: float) -> None:
    curve = Curve(tuple(Point(1e-9, damage, nbytes, score) for nbytes, damage, score in rows), baseline)
    root = ET.fromstring(drawn(curve))
    width, height = float(root.get("width", "")), float(root.get("height", ""))
    marks = [use for use in root.iter(f"{SVG}use") if use.find(f"{SVG}title") is not None]
    assert len(marks) == 2 * len(rows), "in a panel for the damage and in one for the score"
    assert all(0 <= float(m.get("x", "")) <= width and 0 <= float(m.get("y", "")) <= height for m in marks)


def test_more_bytes_lie_to_the_right_and_more_damage_above() -> None:
    found = trace(Synthetic())
    marks = [use for use in ET.fromstring(drawn(found)).iter(f"{SVG}use") if use.find(f"{SVG}title") is not None]
    places = [(float(use.get("x", "")), float(use.get("y", ""))) for use in marks]
    assert len(places) == len(found.points)
    assert places == sorted(places, reverse=True), "from the lower right to the upper left"
    assert [y for _, y in places] == sorted((y for _, y in places), reverse=True)


@pytest.mark.slow
def test_the_picture_names_bytes_and_is_the_same_each_time() -> None:
    curve = Curve((Point(1e-9, 1e-4, 2_000_000, 0.79, 12.3), Point(1e-8, 1e-3, 1_500_000, 0.7)), 0.8)
    texts = [text.text or "" for text in ET.fromstring(drawn(curve)).iter(f"{SVG}text")]
    assert any(re.fullmatch(r"[\d.e+]+ (B|kB|MB|GB)", text) for text in texts)
    assert drawn(curve) == drawn(curve)
    assert "var(" not in drawn(curve), "a file of its own has no style sheet"
