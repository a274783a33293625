"""Tasks of lm-evaluation-harness, from files of our own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import pared
from pared.errors import ConfigError, EvaluationError
from pared.evaluation.opening import opened
from tests.evaluation.models import folder_of

# lm_eval asks git for the version of the code around it.
pytestmark = [pytest.mark.slow, pytest.mark.engine, pytest.mark.child]

CHOICES = [
    ("The water boils at", [" a hundred degrees.", " none."], 0),
    ("The ice melts at", [" a hundred degrees.", " none."], 1),
    ("The first two men walked on", [" the moon.", " water."], 0),
    ("A model that is half as large is", [" a tool.", " as good."], 1),
]
TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
"""
CHOICE = """doc_to_text: "{{query}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
ROLLING = """doc_to_text: ""
doc_to_target: "{{page}}"
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"query": query, "choices": choices, "gold": gold} for query, choices, gold in CHOICES]
    pages = [{"page": query + choices[gold]} for query, choices, gold in CHOICES]
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, data, kind, rest in (
        ("own_choice", rows, "multiple_choice", CHOICE),
        ("own_pages", pages, "loglikelihood_rolling", ROLLING),
    ):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("\n".join(map(json.dumps, data)), encoding="utf-8")
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=file, kind=kind) + rest, encoding="utf-8")
    return folder


@pytest.fixture
def language(tmp_path: Path) -> tuple[Any, Any]:
    folder = folder_of(tmp_path / "model", num_hidden_layers=1)
    return opened(folder, "model")[0], AutoTokenizer.from_pretrained(folder)


def chosen(model: Any, tokenizer: Any) -> list[float]:
    """Which questions the model answers right: the choice with the largest log-likelihood."""
    right = []
    for query, choices, gold in CHOICES:
        sums = []
        for choice in choices:
            ids = tokenizer(query + choice)["input_ids"]
            asked = len(tokenizer(query)["input_ids"])
            windows = pared.evaluate(model, ids), pared.evaluate(model, ids[:asked])
            sums.append(windows[0].loss * windows[0].tokens - windows[1].loss * windows[1].tokens)
        right.append(float(sums[gold] == min(sums)))
    return right


def test_tasks_score_models_in_float_and_in_codes(tasks: Path, language: tuple[Any, Any]) -> None:
    model, tokenizer = language
    score = pared.lm_eval_tasks("own_choice", tokenizer, folder=tasks)
    assert score(model) == chosen(model, tokenizer)
    ids = tokenizer(CHOICES[0][0], return_tensors="pt")["input_ids"]
    small = pared.fit(model, calib_dataloader=[{"input_ids": ids}], quiet=True)
    assert score(small) == chosen(small, tokenizer)


def test_a_metric_where_lower_is_better_is_negated(tasks: Path, language: tuple[Any, Any]) -> None:
    model, tokenizer = language
    one, both = (pared.lm_eval_tasks(["own_pages"], tokenizer, metric="bits_per_byte", folder=tasks, limit=n)
                 for n in (1, None))  # fmt: skip
    page = CHOICES[0][0] + CHOICES[0][1][0]
    ids = [tokenizer.bos_token_id, *tokenizer(page)["input_ids"]]  # the harness begins a page with this token
    found = pared.evaluate(model, ids)
    assert one(model) == pytest.approx(-found.bits_per_token * found.tokens / len(page), rel=1e-4)
    assert isinstance(both(model), float)


def test_what_cannot_be_asked(tasks: Path, language: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = language
    with pytest.raises(ConfigError, match="lm_eval has no task 'nothing'\n  It knows own_choice, own_pages."):
        pared.lm_eval_tasks(["own_choice", "nothing"], tokenizer, folder=tasks)
    with pytest.raises(ConfigError, match="no task is named"):
        pared.lm_eval_tasks([], tokenizer, folder=tasks)
    with pytest.raises(EvaluationError, match="own_choice: has no metric 'f1'\n  Choose one of acc."):
        pared.lm_eval_tasks("own_choice", tokenizer, metric="f1", folder=tasks)(model)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"the package lm_eval, .* is missing .*\n  pip install 'pared\[lm-eval\]'"):
        pared.lm_eval_tasks("own_choice", tokenizer)
