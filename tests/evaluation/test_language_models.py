"""`pared.evaluate` of models and folders, against the same computed at once on each window."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer

import pared
from pared.errors import ConfigError, EvaluationError, FileError
from pared.evaluation import opening
from pared.evaluation.opening import opened
from pared.evaluation.windows import cut
from pared.runtime.record import record_of
from tests.evaluation.models import TEXT, Recurrent, folder_of

IDS = torch.randint(17, (60,), generator=torch.Generator().manual_seed(0))


def dense(model: nn.Module, reference: nn.Module, ids: Tensor, context: int, stride: int | None) -> list[float]:
    """Loss, divergence and agreement, from the probabilities of all tokens in one matrix of doubles."""
    rows = []
    with torch.no_grad():
        for window in cut(len(ids), context, stride):
            both = [one.eval()(ids[None, window.begin : window.end])[0].double() for one in (model, reference)]
            part = slice(window.first - window.begin - 1, window.end - window.begin - 1)
            rows.append([logits[part] for logits in both])
    own, theirs = (torch.cat(parts) for parts in zip(*rows, strict=True))
    kl = F.kl_div(own.log_softmax(-1), theirs.log_softmax(-1), reduction="batchmean", log_target=True)
    agreement = (own.argmax(-1) == theirs.argmax(-1)).double().mean()
    return [float(one) for one in (F.cross_entropy(own, ids[1:]), kl, agreement)]


@pytest.mark.parametrize(("context", "stride"), [(60, None), (100, None), (16, None), (16, 5), (2, 1)])
def test_figures_are_those_of_the_whole_matrices(context: int, stride: int | None) -> None:
    model, reference = Recurrent(), Recurrent(seed=1)
    found = pared.evaluate(model, IDS, reference, context=context, stride=stride)
    expected = dense(model, reference, IDS, context, stride)
    assert [found.loss, found.kl, found.agreement] == pytest.approx(expected, rel=1e-9)
    assert found.perplexity == pytest.approx(math.exp(expected[0]), rel=1e-9)
    assert found.tokens == 59
    assert sum(window.tokens for window in found.windows) == 59
    alone = pared.evaluate(model, IDS, context=context, stride=stride)
    assert (alone.loss, alone.kl, alone.reference_perplexity, alone.bits_per_byte) == (found.loss, None, None, None)


def test_a_model_in_training_mode_is_scored_in_eval_mode_and_comes_back_as_it_was() -> None:
    model = Recurrent().train()
    model.cell.eval()
    state = torch.random.get_rng_state()
    assert pared.evaluate(model, IDS, model, context=16).kl == 0
    assert (model.training, model.cell.training, model.drop.training) == (True, False, True)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_more_context_helps_where_the_model_uses_it() -> None:
    torch.manual_seed(0)
    model = Recurrent()
    pattern = torch.tensor([1, 2, 3, 1, 5, 3, 7, 2]).repeat(20)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        loss = F.cross_entropy(model(pattern[None])[0, :-1], pattern[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    few, many = (pared.evaluate(model, pattern, context=8, stride=stride).loss for stride in (7, 1))
    assert many < few


@pytest.mark.parametrize("kind", [list, tuple, Tensor.numpy, Tensor.int, lambda ids: ids[None]])
def test_tokens_in_any_form(kind: Any) -> None:
    model = Recurrent()
    assert pared.evaluate(model, kind(IDS), context=16).loss == pared.evaluate(model, IDS, context=16).loss


@pytest.mark.parametrize("wrap", [lambda y: (y, None), lambda y: SimpleNamespace(logits=y), lambda y: y.bfloat16()])
def test_outputs_in_any_form(wrap: Any) -> None:
    class Wrapped(Recurrent):
        def forward(self, tokens: Tensor) -> Any:
            return wrap(super().forward(tokens))

    found = pared.evaluate(Wrapped(), IDS, context=16)
    assert found.loss == pytest.approx(pared.evaluate(Recurrent(), IDS, context=16).loss, rel=1e-3)
    assert found.dtype in ("float32", "bfloat16")


class Broken(Recurrent):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * torch.nan


class Translating(Recurrent):
    config = SimpleNamespace(is_encoder_decoder=True)


class Pooled(Recurrent):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens)[:, 0]


@pytest.mark.parametrize(
    ("model", "text", "options", "error", "message"),
    [
        (Recurrent(), [3], {}, EvaluationError, "has 1 tokens, and none can be predicted"),
        (Recurrent(), [], {}, EvaluationError, "has 0 tokens"),
        (Translating(), [1, 2], {}, EvaluationError, "the model is an encoder-decoder, which reads a text as a whole"),
        (Recurrent(), [1, 2, 17], {}, EvaluationError, "token 17 at position 2 is not among the 17 of the model"),
        (Recurrent(), [1, -2, 3], {}, EvaluationError, "token -2 at position 1"),
        (Recurrent(), [[1, 2], [3, 4]], {}, ConfigError, "a list is neither a text nor its tokens"),
        (Recurrent(), [[1, 2], [3]], {}, ConfigError, "a list is neither a text nor its tokens"),
        (Recurrent(), [0.5, 1.5], {}, ConfigError, "a list is neither a text nor its tokens"),
        (Recurrent(), "words", {}, ConfigError, "there is no tokenizer for the text"),
        (Recurrent(), "words", {"tokenizer": 3}, ConfigError, "the tokenizer cannot be called"),
        (Recurrent(), Path("nowhere.txt"), {"tokenizer": len}, FileError, "nowhere.txt: cannot be read"),
        (Recurrent(), IDS, {"reference": Recurrent(20)}, EvaluationError, "logits for 17 tokens, the reference for 20"),
        (Recurrent(), IDS, {"stride": 512}, ConfigError, "stride=512 leaves tokens without context"),
        (Recurrent(), IDS, {"reference": 3}, ConfigError, "reference"),
        ("nowhere", IDS, {}, ConfigError, "nowhere: model is neither a model nor a folder"),
        (Broken(), IDS, {}, EvaluationError, "the logits of the model hold NaN"),
        (Pooled(), IDS, {}, EvaluationError, r"no logits of \(1, 60, vocabulary\), of \(1, 17\)"),
    ],
)
def test_what_cannot_be_evaluated(
    model: Any, text: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    if not isinstance(model, str):
        model.get_input_embeddings = lambda: model.table
    with pytest.raises(error, match=message):
        pared.evaluate(model, text, **options)


def test_the_name_of_a_file_is_not_taken_for_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("A text.", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"text='text.txt' is the name of a file\n  Pass pathlib.Path"):
        pared.evaluate(Recurrent(), "text.txt")


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kind"), [("Llama", "smollm"), ("GPT-2", "gpt2"), ("Mistral", "llama")])
def test_a_text_is_read_with_the_tokenizer_of_the_folder(family: str, kind: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", family, kind)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    found = pared.evaluate(folder, tmp_path / "text.txt", context=48)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, _ = opened(folder, "model")
    assert pared.evaluate(model, TEXT, tokenizer=tokenizer, context=48) == found
    plain = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    begins = kind == "llama"  # its tokenizer puts <s> before a text, and then before each window
    assert found.tokens == len(plain) - (not begins)
    ids = torch.tensor([*([1] if begins else []), *plain[: 47 if begins else 48]])
    with torch.no_grad():
        loss = F.cross_entropy(model(ids[None]).logits[0, :-1].double(), ids[1:], reduction="sum")
    assert found.windows[0].loss == pytest.approx(float(loss), rel=1e-9)
    nbytes = len(TEXT.encode()) - (0 if begins else len(tokenizer.decode(plain[:1])))
    assert found.bits_per_byte == pytest.approx(found.loss * found.tokens / math.log(2) / nbytes, rel=1e-9)


@pytest.mark.slow
def test_a_fitted_folder_beside_the_float_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path / "model", num_hidden_layers=1)
    model, _ = opened(folder, "model")
    small = pared.fit(model, calib_dataloader=[{"input_ids": IDS[None]}], quiet=True)
    small.save(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"has no config.json"):
        pared.evaluate(tmp_path / "out", IDS)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "out" / name).write_bytes((folder / name).read_bytes())
    found = pared.evaluate(tmp_path / "out", TEXT, folder, context=32)
    assert found == pared.evaluate(small, TEXT, model, tokenizer=AutoTokenizer.from_pretrained(folder), context=32)
    assert 0 < found.kl < 0.1
    assert found.agreement > 0.8
    monkeypatch.setattr(opening, "available", lambda: 1)
    loaded, _ = opened(tmp_path / "out", "model")
    assert record_of(loaded).memory == "small"
    assert pared.evaluate(loaded, IDS).loss == pytest.approx(pared.evaluate(small, IDS).loss, rel=1e-5)


@pytest.mark.slow
def test_folders_that_do_not_belong_together(tmp_path: Path) -> None:
    one, other = folder_of(tmp_path / "one"), folder_of(tmp_path / "other", "Llama", "llama")
    with pytest.raises(EvaluationError, match="the tokenizers of the two folders have different vocabularies"):
        pared.evaluate(one, TEXT, other)
    with pytest.raises(ConfigError, match="context=257 is more than the 256 tokens that the model takes"):
        pared.evaluate(one, TEXT, context=257)
    (one / "tokenizer.json").unlink()
    with pytest.raises(FileError, match="has no tokenizer that transformers can read"):
        pared.evaluate(one, TEXT)


@pytest.mark.slow
def test_weights_too_large_for_the_machine_in_float32_are_read_in_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_of(tmp_path / "model", num_hidden_layers=1)
    assert pared.evaluate(folder, IDS).dtype == "float32"
    monkeypatch.setattr(opening, "available", lambda: 1)
    assert pared.evaluate(folder, IDS).dtype == "bfloat16"
    assert "more than there is room for: it is read in bfloat16" in caplog.text
