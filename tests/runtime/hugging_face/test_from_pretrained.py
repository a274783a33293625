"""`from_pretrained` opens folders of ours: the very model that was fitted, of the class that was asked for."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import pared
from pared.fitting.hugging_face.loading import model_in
from pared.model.contents import same
from pared.runtime.layers.counterpart import Counterpart
from pared.runtime.record import contents_of, record_of
from tests.runtime.hugging_face.folders import IDS, WEIGHTS, fitted, folder, source, text_of
from tests.targets.families.models import built

pytestmark = pytest.mark.slow


def opened(place: Path | None = None, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(place or folder(), **options)


def codes_of(model: Any) -> list[str]:
    """The layers that hold codes."""
    return [name for name, one in model.named_modules() if isinstance(one, Counterpart)]


@pytest.fixture(scope="module")
def loaded() -> Any:
    return opened()


def test_the_model_is_the_fitted_one(loaded: Any) -> None:
    assert isinstance(loaded, transformers.LlamaForCausalLM)
    assert same(contents_of(loaded), contents_of(fitted()))
    assert record_of(loaded).running == record_of(fitted()).running
    assert codes_of(loaded) == codes_of(fitted())
    assert not loaded.training
    assert torch.equal(loaded(IDS).logits, fitted()(IDS, use_cache=True).logits)
    assert text_of(loaded) == text_of(fitted())
    assert loaded.config.quantization_config["quant_method"] == "pared"


def test_layers_run_in_int8_where_nothing_was_timed(tmp_path: Path) -> None:
    for name in ("config.json", "best_model.safetensors"):
        (tmp_path / name).write_bytes((folder() / name).read_bytes())
    found = opened(tmp_path)
    assert len(codes_of(found)) > 10
    loaded = pared.load(tmp_path, transformers.LlamaForCausalLM(fitted().config), warm=False)
    with torch.no_grad():
        assert torch.equal(found(IDS).logits, loaded(IDS, use_cache=True).logits)


def test_it_does_what_a_quantized_model_does(loaded: Any, tmp_path: Path) -> None:
    for other in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert text_of(other) == text_of(loaded)
    assert loaded.eval() is loaded
    assert loaded.to("cpu") is loaded
    path = pared.save(loaded, tmp_path, container="safetensors")
    assert path.read_bytes() == (folder() / path.name).read_bytes()
    assert set(loaded.state_dict()) == set(fitted().state_dict())


FAMILIES = {
    "tied": ("Qwen2", "AutoModelForCausalLM", {}),
    "untied": ("Llama", "AutoModelForCausalLM", {"tie_word_embeddings": False}),
    "convolutions of 1": ("GPT-2", "AutoModelForCausalLM", {}),
    "encoder": ("BERT", "AutoModel", {}),
}


@pytest.mark.parametrize("case", FAMILIES)
def test_families(case: str, tmp_path: Path) -> None:
    family, auto, changes = FAMILIES[case]
    model = built(family, **changes)
    q: Any = pared.fit(model, WEIGHTS, quiet=True)
    q.save_pretrained(tmp_path)
    found = getattr(transformers, auto).from_pretrained(tmp_path, attn_implementation="eager")
    assert isinstance(found, type(model))
    assert same(contents_of(found), contents_of(q))
    assert torch.equal(found(IDS)[0], q(IDS)[0])
    tied = {id(one) for one in found.parameters()}
    assert len(tied) == len({id(one) for one in q.parameters()})


def test_encoder_and_decoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    config: Any = transformers.T5Config(vocab_size=320, **sizes)
    config.decoder_start_token_id = 0
    model: Any = transformers.T5ForConditionalGeneration(config)
    q: Any = pared.fit(model.eval(), WEIGHTS, quiet=True)
    q.save_pretrained(tmp_path)
    assert text_of(transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)) == text_of(q)


@pytest.mark.child
def test_a_fresh_process(tmp_path: Path) -> None:
    """Without pared there are no weights, rather than random ones; once it is imported, every token is the same."""
    code = f"""if True:
        import json, sys
        sys.path.insert(0, {str(Path.cwd())!r})
        from transformers import AutoModelForCausalLM
        try:
            AutoModelForCausalLM.from_pretrained({str(folder())!r})
        except OSError as error:
            refused = str(error)
        import pared
        from tests.runtime.hugging_face.folders import text_of
        model = AutoModelForCausalLM.from_pretrained({str(folder())!r})
        print(json.dumps([refused, text_of(model)]))
        """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    refused, tokens = json.loads(done.stdout.splitlines()[-1])
    assert "Error no file named model.safetensors" in refused
    assert tokens == text_of(fitted())


def test_weights_stay_in_codes_where_config_json_says_so(tmp_path: Path) -> None:
    small: Any = pared.load(folder(), transformers.LlamaForCausalLM(fitted().config), memory="small")
    small.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["memory"] == "small"
    found = opened(tmp_path)
    assert record_of(found).memory == "small"
    assert text_of(found) == text_of(small)


@pytest.mark.parametrize(
    "options", [{"dtype": "auto"}, {"torch_dtype": torch.float32}, {"device_map": "cpu"}, {"device_map": "auto"}]
)
def test_options_that_change_nothing(options: dict[str, Any]) -> None:
    found = opened(**options)
    assert codes_of(found) == codes_of(fitted())
    assert found.dtype == torch.float32


def test_another_type_is_obeyed_and_said_to_be_slow(caplog: pytest.LogCaptureFixture) -> None:
    found = opened(dtype=torch.float16)
    assert found(IDS).logits.dtype == torch.float16
    assert "in torch.float16 on cpu it runs on decoded weights, which are larger and slower" in caplog.text


def test_bfloat16_is_what_load_gives(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pared.fit(model_in(source()), WEIGHTS, quiet=True).save_pretrained(tmp_path)
    found = opened(tmp_path, dtype=torch.bfloat16)
    empty = transformers.LlamaForCausalLM(fitted().config)
    loaded: Any = pared.load(tmp_path, empty, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(found(IDS).logits, loaded(IDS).logits)
    assert found(IDS).logits.dtype == torch.bfloat16
    assert found.lm_head.pared_codes("weight") is found.get_input_embeddings().pared_codes("weight")
    assert caplog.text == ""


def test_a_pipeline() -> None:
    generate = transformers.pipeline("text-generation", model=str(folder()))
    assert record_of(generate.model).tensors
    (found,) = generate("The water", max_new_tokens=3, do_sample=False)
    assert found["generated_text"].startswith("The water")


def test_a_trainer_evaluates_and_does_not_train(loaded: Any, tmp_path: Path) -> None:
    data: Any = [{"input_ids": IDS[0], "labels": IDS[0]}] * 2
    options = transformers.TrainingArguments(str(tmp_path / "run"), report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = transformers.Trainer(loaded, options, eval_dataset=data, train_dataset=data)
    with torch.no_grad():
        want = fitted()(IDS, labels=IDS).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(want.item(), rel=1e-6)
    trainer.save_model(tmp_path / "saved")
    assert (tmp_path / "saved" / "best_model.safetensors").is_file()
    assert not any(one.requires_grad for one in loaded.parameters())


def test_code_in_a_folder_runs_only_when_asked(tmp_path: Path) -> None:
    for path in folder().iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "own.LlamaForCausalLM"}, "model_type": "of_its_own"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('this was run')")
    with pytest.raises(ValueError, match="of_its_own"):
        opened(tmp_path, trust_remote_code=False)


def test_other_parts_of_the_object_are_those_of_transformers(loaded: Any) -> None:
    assert isinstance(loaded.model.embed_tokens, nn.Embedding)
    assert loaded.generation_config.eos_token_id == 2
    assert loaded.name_or_path == str(folder())
