"""What calls show of a graph whose answers are compared: neither rounding nor a fault is taken for the other."""

import pytest
import torch

from pared.runtime.graphs.containers import container_of
from pared.runtime.serving.agreement import Agreement, differences, of_containers

TOLERANCE = 0.01
ROUNDING, DOUBTFUL, FAULT = (0.001, 1.0), (0.05, 1.0), (0.2, 1.0)


@pytest.mark.parametrize(
    ("calls", "verdicts"),
    [
        ([ROUNDING], ["right"]),
        ([FAULT], ["wrong"]),
        ([DOUBTFUL, (0.0, 9.0)], ["unsure", "right"]),  # 0.05 of 10
        ([DOUBTFUL, FAULT], ["unsure", "wrong"]),
        ([DOUBTFUL] * 4, ["unsure", "unsure", "unsure", "wrong"]),
        ([(0.0, 0.0)], ["right"]),
        ([(1e-9, 0.0)], ["wrong"]),
    ],
)
def test_energies_of_calls_add_up(calls: list[tuple[float, float]], verdicts: list[str]) -> None:
    agreement = Agreement(TOLERANCE)
    assert [agreement.verdict([[call]]) for call in calls] == verdicts


def test_each_tensor_has_to_agree() -> None:
    assert Agreement(TOLERANCE).verdict([[ROUNDING], [ROUNDING, FAULT]]) == "wrong"
    agreement = Agreement(TOLERANCE)
    assert agreement.verdict([[ROUNDING, DOUBTFUL]]) == "unsure"
    assert agreement.verdict([[ROUNDING, (0.0, 9.0)]]) == "right"


def test_what_differs_in_more_than_rounding_is_wrong() -> None:
    assert Agreement(TOLERANCE).verdict([[ROUNDING], None]) == "wrong"
    agreement = Agreement(TOLERANCE)
    assert agreement.verdict([[DOUBTFUL]]) == "unsure"
    assert agreement.verdict([[ROUNDING, ROUNDING]]) == "wrong"
    assert differences(torch.tensor([1, 2]), torch.tensor([1, 3])) is None
    assert differences(torch.ones(2), torch.ones(2, dtype=torch.float64)) is None
    assert differences([torch.ones(2), True], [torch.ones(2), False]) is None
    assert differences(torch.tensor([1.0, float("inf")]), torch.ones(2)) is None


def test_infinities_in_the_same_places_do_not_count() -> None:
    infinite = torch.tensor([2.0, float("-inf")])
    assert differences(infinite + 1, infinite) == [(1.0, 4.0)]


def test_caches_are_compared_by_their_tensors() -> None:
    from transformers import DynamicCache

    def cache(factor: float) -> DynamicCache:
        found = DynamicCache()
        found.update(torch.ones(1, 2, 3, 4), factor * torch.ones(1, 2, 3, 4), 0)
        return found

    ours, theirs = container_of(cache(2.0)), container_of(cache(1.0))
    assert theirs is not None
    assert of_containers(ours, theirs) == [(0.0, 24.0), (24.0, 24.0)]
    assert of_containers(None, theirs) is None
