"""Tasks of EleutherAI's lm-evaluation-harness as an `eval_func`."""

from __future__ import annotations

import importlib
import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from pared.errors import ConfigError, EvaluationError
from pared.switches import random_states_kept


def lm_eval_tasks(
    tasks: str | Sequence[str],
    tokenizer: Any,
    *,
    metric: str = "acc",
    folder: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    **options: Any,
) -> Callable[[nn.Module], Any]:
    """An `eval_func` for `fit` from tasks of lm-evaluation-harness (`pip install 'pared[lm-eval]'`).

    Higher is better, whatever the metric: one where lower is better is returned negated.

    Args:
        tasks: names of tasks, or one of them. The harness fetches the data of its own tasks from a network.
        tokenizer: the model's, one of transformers.
        metric: a metric of all these tasks, such as "acc", "acc_norm", "exact_match" or "bits_per_byte".
        folder: a directory with tasks of your own, as YAML; then only those are known.
        limit: the most questions of each task. Default: all.
        batch_size: how many are answered at once.
        options: whatever else `lm_eval.simple_evaluate` takes, such as `num_fewshot` or `apply_chat_template`.

    Returns:
        a function of a model of transformers. It returns the metric of each question, where it is a number for each, so
        that `fit` confirms the result on questions that its search has not seen; else the mean over the tasks.

    Raises:
        ConfigError: lm_eval is missing, or does not know a task.
    """
    try:
        lm_eval, language, known = map(
            importlib.import_module, ("lm_eval", "lm_eval.models.huggingface", "lm_eval.tasks")
        )
    except ImportError as error:
        raise ConfigError(
            f"the package lm_eval, or one that it needs, is missing ({error})",
            where="pared.lm_eval_tasks",
            remedy="pip install 'pared[lm-eval]' transformers accelerate",
        ) from error
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    manager = known.TaskManager(
        include_path=None if folder is None else os.fspath(folder), include_defaults=folder is None
    )
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown or not names:
        raise ConfigError(
            f"lm_eval has no task {unknown[0]!r}" if unknown else "no task is named",
            where="pared.lm_eval_tasks",
            remedy=f"It knows {', '.join(manager.all_tasks[:10])}{', ...' if len(manager.all_tasks) > 10 else ''}.",
        )

    def score(model: nn.Module) -> Any:
        device = next(model.parameters()).device
        wrapped = language.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=str(device))
        with random_states_kept():  # the harness sets all seeds
            found = lm_eval.simple_evaluate(
                model=wrapped, tasks=names, task_manager=manager, limit=limit, bootstrap_iters=0, **options
            )
        return _scores(found, metric)

    return score


def _scores(found: Any, metric: str) -> Any:
    """The metric of each question, or the mean over the tasks, from what the harness returned."""
    answers: list[Any] = []
    means: list[float] = []
    for task, questions in found["samples"].items():
        result = found["results"][task]
        keys = [key for key in result if key.startswith(f"{metric},")]
        if not keys:
            offered = sorted({key.split(",")[0] for key in result if "," in key and "_stderr" not in key})
            raise EvaluationError(
                f"has no metric {metric!r}",
                where=f"pared.lm_eval_tasks: {task}",
                remedy=f"Choose one of {', '.join(offered)}.",
            )
        sign = 1 if found["higher_is_better"][task].get(metric, True) else -1
        means.append(sign * float(result[keys[0]]))
        chosen = [one for one in questions if one["filter"] == keys[0].split(",")[1]]
        answers += [sign * one[metric] if isinstance(one[metric], (int, float)) else None for one in chosen]
    return answers if len(answers) >= 4 and None not in answers else statistics.fmean(means)
