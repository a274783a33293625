"""The simulation of many workers, at its ends."""

import pytest
from bench.scale.simulation import Costs, seconds


@pytest.mark.parametrize("workers", [1, 3, 8])
def test_without_a_driver_workers_share_the_work(workers: int) -> None:
    assert seconds(Costs(2.0, 0.5, 0.0), 24, workers) == pytest.approx(24 * 2.5 / workers)


def test_the_driver_is_the_limit_of_many() -> None:
    costs = Costs(1.0, 0.0, 0.1)
    few, many, more = (seconds(costs, 1000, workers) for workers in (5, 20, 500))
    assert few == pytest.approx(200, rel=0.01)
    assert many == pytest.approx(100, rel=0.02)  # 1000 results, one after the other
    assert more == pytest.approx(many, rel=0.02)


def test_one_task_is_not_divided() -> None:
    assert seconds(Costs(1.0, 0.25, 0.5), 1, 8) == 1.75
