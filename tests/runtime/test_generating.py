"""Language models in OpenVINO with their caches inside: what openvino-genai writes is what the model writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import pared
from pared import ConfigError, ModelError, PostTrainingQuantConfig
from pared.fitting.hugging_face.loading import model_in
from pared.formats.groups.grid import GroupGrid
from pared.model.tensors import find_tensors
from pared.runtime.float_forms import decoded, floats_of
from pared.runtime.openvino.caches.generating import export_generating
from tests.runtime.exports import sqnr
from tests.runtime.grouped import contents_with
from tests.targets.families.models import built
from tests.targets.gguf.folders import folder_with

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # warnings of libraries

IDS = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, "KV_CACHE_PRECISION": "f32"}
FAMILIES = {
    "Llama": {},
    "Mistral": {"sliding_window": None},
    "Qwen2": {},
    "Qwen3": {},
    "Gemma": {},
    "Phi-3": {"sliding_window": None},
    "GPT-2": {},
}


def source(folder: Path, family: str = "Llama", **changes: Any) -> Any:
    """The model of a folder with a tokenizer, as transformers opens it."""
    folder_with(folder, "smollm")
    built(family, **changes).save_pretrained(folder)
    return model_in(folder)


def fitted(model: nn.Module) -> Any:
    nbytes = sum(one.numel() for one in model.parameters())
    small = PostTrainingQuantConfig(target="openvino", approach="weight_only", max_size=nbytes)
    return pared.fit(model, small, [{"input_ids": IDS}], quiet=True)


class Steps:
    """A graph that goes on with texts."""

    def __init__(self, file: Path) -> None:
        compiled = openvino.Core().compile_model(str(file), "CPU", EXACT)
        self._names = {name for port in compiled.inputs for name in port.names}
        self._request = compiled.create_infer_request()
        self._past = 0

    def __call__(self, ids: Tensor, order: list[int]) -> np.ndarray:
        begin, self._past = self._past, self._past + ids.shape[1]
        given = {
            "input_ids": ids.numpy(),
            "attention_mask": np.ones((len(ids), self._past), np.int64),
            "position_ids": np.arange(begin, self._past)[None].repeat(len(ids), 0),
            "beam_idx": np.array(order, np.int32),
        }
        found = self._request.infer({name: one for name, one in given.items() if name in self._names})
        return np.array(found["logits"])


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_are_those_of_the_model(family: str, tmp_path: Path) -> None:
    model = built(family, **FAMILIES[family])
    rows = {f"{name}.weight": (1,) for name, one in model.named_modules() if isinstance(one, Conv1D)}
    contents = contents_with(model, {"*": GroupGrid(4, 32, "code", "float16")}, rows)
    floats = [decoded(find_tensors(model), contents) for _ in range(2)]
    with torch.no_grad():
        expected = floats[0](input_ids=IDS).logits.numpy()
        turned = floats[0](input_ids=torch.cat([IDS[[1, 0], :8], IDS[:, :2]], 1)).logits.numpy()
    written = export_generating(floats[1], contents, tmp_path, None)
    assert set(written.codes) >= {
        one.name for one in find_tensors(model) if "layers" in one.name and one.tensor.dim() > 1
    }
    assert written.floats == {}
    assert written.outputs["logits"][-1:] == (320,)
    steps = Steps(written.path)
    found = [steps(IDS[:, begin:end], [0, 1]) for begin, end in ((0, 5), (5, 6), (6, 8))]
    assert sqnr(np.concatenate(found, 1), expected[:, :8]) > 80
    assert sqnr(steps(IDS[:, :2], [1, 0]), turned[:, 8:]) > 80, "the texts change places"


@pytest.mark.parametrize("backend", ["SDPA", "PA"])
def test_openvino_genai_writes_the_same_text(backend: str, tmp_path: Path) -> None:
    model = source(tmp_path / "source")
    q = fitted(model)
    written = pared.export(q, tmp_path / "out", to="openvino", folder=tmp_path / "source")
    assert written.nbytes == sum(written.path.with_suffix(end).stat().st_size for end in (".xml", ".bin"))
    pipeline = openvino_genai.LLMPipeline(str(tmp_path / "out"), "CPU", **EXACT, ATTENTION_BACKEND=backend)
    greedy = openvino_genai.GenerationConfig(max_new_tokens=10, do_sample=False, ignore_eos=True)
    ids = IDS[:1]
    expected = floats_of(q).generate(
        ids, max_new_tokens=10, do_sample=False, attention_mask=torch.ones_like(ids), eos_token_id=None, pad_token_id=0
    )
    assert pipeline.generate(openvino.Tensor(ids.numpy()), greedy).tokens[0] == expected[0, 12:].tolist()
    tokenizer = pipeline.get_tokenizer()
    assert tokenizer.encode("The water boils.").input_ids.data.shape[1] > 3
    assert tokenizer.decode(tokenizer.encode("The water boils.").input_ids)[0] == "The water boils."
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], True) == "Hello"


def test_an_artifact_beside_it_still_opens(tmp_path: Path) -> None:
    model = source(tmp_path / "source")
    model.generation_config.eos_token_id = 7
    q = fitted(model)
    q.save_pretrained(tmp_path / "out")
    for _ in range(2):
        pared.export(q, tmp_path / "out", to="openvino", folder=tmp_path / "source")
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert opened.pared.plan == q.pared.plan
    assert opened.generation_config.eos_token_id == 7


def test_the_float_model_in_the_same_folder_still_opens(tmp_path: Path) -> None:
    q = fitted(source(tmp_path))
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(ConfigError, match="holds a model that pared did not write"):
        pared.export(q, tmp_path, to="openvino", folder=tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before
    assert not list(tmp_path.glob("openvino*"))


@pytest.mark.parametrize("write", ["save_pretrained", "export"])
def test_a_configuration_that_is_not_valid_is_refused_before_work(write: str, tmp_path: Path) -> None:
    q = fitted(built("Llama"))
    q.generation_config.temperature = 0.5  # without do_sample
    with pytest.raises(ConfigError, match="its configuration cannot be written: .*temperature"):
        pared.export(q, tmp_path / "out", to="openvino") if write == "export" else q.save_pretrained(tmp_path / "out")
    assert list(tmp_path.rglob("*.*")) == []


def test_without_a_folder_there_is_no_tokenizer(tmp_path: Path) -> None:
    pared.export(fitted(built("Llama")), tmp_path / "out", to="openvino")
    assert {one.name for one in (tmp_path / "out").iterdir()} == {
        *("openvino_model.xml", "openvino_model.bin", "config.json", "generation_config.json"),
    }


def test_a_cache_that_forgets_is_written_as_one_call() -> None:
    with pytest.raises(ConfigError, match=r"there are no inputs\n  Pass one batch"):
        pared.export(fitted(built("Gemma 3")), "out", to="openvino")


def test_a_folder_without_a_tokenizer_is_written_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    q = fitted(source(tmp_path / "source"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "source" / name).unlink()
    pared.export(q, tmp_path / "out", to="openvino", folder=tmp_path / "source")
    assert not (tmp_path / "out" / "openvino_tokenizer.xml").exists()
    assert "has no tokenizer" in caplog.text


def test_a_tokenizer_that_is_broken_is_refused(tmp_path: Path) -> None:
    q = fitted(source(tmp_path / "source"))
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="its tokenizer cannot be converted for OpenVINO"):
        pared.export(q, tmp_path / "out", to="openvino", folder=tmp_path / "source")
    assert not (tmp_path / "out").exists()


def test_bfloat16_is_refused_before_the_work(tmp_path: Path) -> None:
    model = built("Llama").bfloat16()
    q = pared.fit(model, PostTrainingQuantConfig(approach="weight_only"), [{"input_ids": IDS}], quiet=True)
    with pytest.raises(ModelError, match="is a model in bfloat16"):
        pared.export(q, tmp_path / "out", to="openvino")
