"""Models and tokenizers in llama.cpp: what it computes, and how it reads text."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pared.targets.families.table import FAMILIES
from pared.targets.gguf.target import TARGET
from pared.targets.gguf.write import write
from pared.targets.target import Offer
from tests.targets.families.models import built
from tests.targets.gguf.folders import TEXTS, folder_with
from tests.targets.gguf.sources import source_of

pytestmark = [pytest.mark.engine, pytest.mark.slow]

_KINDS = {"Qwen2": "qwen2", "Qwen3": "qwen2", "GPT-2": "gpt2", "BERT": "bert"}
_IDS = list(range(105, 117))
# One token is said whatever is likely: of one that ends within a character, the server says nothing at all.
_SAID = [[50, 1000.0]]


@contextmanager
def server_of(path: Path, **settings: Any) -> Iterator[Any]:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = 64
    params.n_parallel = 1
    params.warmup = False
    params.verbosity = -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    for name, value in settings.items():
        setattr(params, name, value)
    yield xllamacpp.Server(params)


def as_said(name: str, offers: tuple[Offer, ...], wanted: str) -> Offer | None:
    return next((offer for offer in offers if offer.name == wanted), None)


def written(family: str, kind: str, folder: Path, **changes: Any) -> tuple[Any, Path]:
    """A model in a format, and its file."""
    model: Any = built(family, **changes)
    folder_with(folder / "source", _KINDS.get(family, "llama"), model.config.to_dict())
    if family == "BERT":
        (folder / "source" / "1_Pooling").mkdir()
        pooling = {"pooling_mode_mean_tokens": True, "word_embedding_dimension": 64}
        (folder / "source" / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    source = source_of(model, TARGET, lambda name, offers: as_said(name, offers, kind), folder / "source")
    return model, write(source, folder / "model.gguf")[0]


def probabilities(server: Any) -> Any:
    request = {"prompt": _IDS, "n_predict": 1, "temperature": 0, "n_probs": 320, "logit_bias": _SAID}
    answer = server.handle_completions({**request, "cache_prompt": False})
    found = torch.full((320,), -torch.inf)
    for one in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        found[one["id"]] = one["logprob"]
    return found.log_softmax(-1)


# llama.cpp rounds the inputs of products with quantized weights to 8 bits.
@pytest.mark.parametrize(("kind", "tolerance"), [("F32", 0.01), ("Q8_0", 0.1), ("Q4_0", 0.1)])
@pytest.mark.parametrize("family", [family.name for family in FAMILIES if family.output == "logits"])
def test_it_computes_what_transformers_does(family: str, kind: str, tolerance: float, tmp_path: Path) -> None:
    model, file = written(family, kind, tmp_path)
    with torch.no_grad():
        expected = model(torch.tensor([_IDS])).logits[0, -1].log_softmax(-1)
    with server_of(file) as server:
        found = probabilities(server)
    assert (found - expected).abs().max() < tolerance


@pytest.mark.parametrize(("family", "changes"), [("Llama", {"attention_bias": True, "mlp_bias": True}), ("Qwen2", {})])
def test_biases_of_queries_and_keys_are_in_the_order_of_their_rows(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    model, file = written(family, "F32", tmp_path, **changes)
    bias = model.get_parameter("model.layers.0.self_attn.q_proj.bias")
    assert bias.abs().min() > 0
    with torch.no_grad():
        expected = model(torch.tensor([_IDS])).logits[0, -1].log_softmax(-1)
        order = torch.randperm(len(bias), generator=torch.Generator().manual_seed(0))
        bias.copy_(bias[order])
        other = model(torch.tensor([_IDS])).logits[0, -1].log_softmax(-1)
    with server_of(file) as server:
        found = probabilities(server)
    assert (found - expected).abs().max() < 0.01 < (other - expected).abs().max()


@pytest.mark.parametrize("kind", ["Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K"])
def test_blocks_of_256_columns(kind: str, tmp_path: Path) -> None:
    model, file = written("Llama", kind, tmp_path, hidden_size=256, intermediate_size=512)
    with torch.no_grad():
        expected = model(torch.tensor([_IDS])).logits[0, -1].log_softmax(-1)
    with server_of(file) as server:
        found = probabilities(server)
    assert (found - expected).abs().max() < 0.25


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_an_encoder(kind: str, tmp_path: Path) -> None:
    model, file = written("BERT", kind, tmp_path)
    with torch.no_grad():
        expected = model(torch.tensor([_IDS]))[0][0].mean(0).numpy()
    with server_of(file, embedding=True) as server:
        answer = server.handle_embeddings({"input": _IDS, "encoding_format": "float"})
    found = np.array(answer["data"][0]["embedding"])
    cosine = found @ expected / np.linalg.norm(found) / np.linalg.norm(expected)
    assert cosine > 0.9999


def tokens_of(server: Any, text: str) -> list[int]:
    body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
    request = urllib.request.Request(f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request) as answer:
        found: list[int] = json.load(answer)["tokens"]
    return found


@pytest.mark.parametrize(
    ("family", "kind"),
    [("GPT-2", "gpt2"), ("Llama", "smollm"), ("Qwen2", "qwen2"), ("Llama", "llama"), ("BERT", "bert")],
)
def test_it_reads_text_as_tokenizers_does(family: str, kind: str, tmp_path: Path) -> None:
    model: Any = built(family)
    tokenizer = folder_with(tmp_path / "source", kind, model.config.to_dict())
    source = source_of(model, TARGET, folder=tmp_path / "source")
    with server_of(write(source, tmp_path)[0], embedding=family == "BERT") as server:
        for text in (*TEXTS, "It's 42 times <tool> 1,337.5!\n\n  So what?", "r\u00e9sum\u00e9 \u65e5\u672c"):
            if kind == "bert" and "\u65e5" in text:
                continue  # llama.cpp reads what is unknown character by character
            assert tokens_of(server, text) == tokenizer.encode(text).ids, text
