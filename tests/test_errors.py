"""Errors of any kind as one line, for reports and messages of ours."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from pared.errors import ModelError, reason_of

CASES: dict[str, tuple[Callable[[], object], str]] = {
    "of a library": (lambda: np.linalg.inv(np.zeros((2, 2))), "LinAlgError: Singular matrix (raised in numpy)"),
    "of Python": (lambda: json.loads(""), "JSONDecodeError: Expecting value: line 1 column 1 (char 0)"),
    "of nobody's": (lambda: {}["a\nb"], "KeyError: a"),
}


@pytest.mark.parametrize("case", CASES)
def test_it_says_whose_it_is(case: str) -> None:
    call, expected = CASES[case]
    with pytest.raises(Exception) as caught:  # noqa: PT011  # of every kind
        call()
    assert reason_of(caught.value) == expected


def test_what_one_of_ours_quotes_is_one_line() -> None:
    quoted = ModelError(f"cannot be exported: RuntimeError: {'x' * 400}\n  more of it\n", remedy="Look.")
    reason = reason_of(quoted)
    assert reason.startswith("cannot be exported: RuntimeError: xxx")
    assert len(reason) == 300
