"""Models of transformers keep their class, configuration and generation."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

import pared
from pared import PostTrainingQuantConfig

pytestmark = pytest.mark.slow  # almost every test here fits a whole model

IDS = torch.arange(1, 13).reshape(2, 6)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=2100, n_positions=32, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    return model.eval()  # type: ignore[no-untyped-call]  # transformers


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, vocab_size=2100)
    config.decoder_start_token_id = 0
    model = T5ForConditionalGeneration(config)
    return model.eval()  # type: ignore[no-untyped-call]  # transformers


@pytest.mark.parametrize("batch", [{"input_ids": IDS}, (IDS,)], ids=["named", "in order"])
def test_a_decoder_without_inputs_is_told(batch: object) -> None:
    with pytest.raises(pared.CalibrationError) as caught:
        pared.fit(t5(), None, [batch], quiet=True)
    said = str(caught.value)
    assert "batch 0: there are no inputs for the decoder, without which the model raised ValueError: You must" in said
    assert '{"input_ids": ..., "decoder_input_ids": ...}, or with "labels"' in said
    wrong = {"input_ids": IDS, "decoder_input_ids": IDS.float()}
    with pytest.raises(pared.CalibrationError, match="the model raised") as caught:
        pared.fit(t5(), None, [wrong], quiet=True)
    assert "no inputs for the decoder" not in str(caught.value)


@pytest.mark.parametrize("make", [gpt2, t5], ids=["gpt2", "t5"])
@pytest.mark.parametrize("approach", ["weight_only", "auto", "dynamic"])
def test_generation_works_before_and_after_saving(make, approach: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]  # either
    model = make()
    batch = {"input_ids": IDS, **({"decoder_input_ids": IDS} if make is t5 else {})}
    q = pared.fit(model, PostTrainingQuantConfig(approach=approach, quant_level=0), [batch])
    assert isinstance(q, type(model))
    assert q.config is not None
    said = q.generate(IDS, max_new_tokens=5, do_sample=False)
    pared.save(q, tmp_path)
    with torch.device("meta"):
        skeleton = type(model)(model.config).eval()
    loaded = pared.load(tmp_path, model=skeleton)
    for other in (loaded, copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        assert torch.equal(other.generate(IDS, max_new_tokens=5, do_sample=False), said)
    exact, quantized = model(**batch).logits, q(**batch).logits
    assert 10 * torch.log10(exact.square().sum() / (exact - quantized).square().sum()) > 20
