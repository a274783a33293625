"""Calls with caches of transformers as graphs: text is generated as by the modules, and caches stay what they are."""

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.modeling_outputs import BaseModelOutput

import pared
from pared import PostTrainingQuantConfig
from pared.runtime import float_forms
from pared.runtime.graphs.call_kinds import Argument, arguments_of, bind, kind_of, parameters_of
from pared.runtime.graphs.capturing.capture import Captures
from pared.runtime.graphs.containers import Layout, container_of, layout_from, renewed
from pared.runtime.graphs.graph import Graph
from pared.runtime.openvino.graph import OpenVinoGraph
from pared.runtime.profile.timings import Served
from pared.runtime.record import record_of
from pared.runtime.serving.graph_server import GraphServer
from pared.runtime.serving.openvino_server import OpenVinoServer
from pared.runtime.serving.served import SERVER, on_modules, serve
from pared.runtime.serving.settling import SettlingServer
from tests.runtime.test_graphs import forced

pytestmark = [pytest.mark.slow, pytest.mark.engine]

STEPS = 22
PROMPT = torch.tensor([[5, 71, 33, 8, 90, 14]])
OTHER = torch.tensor([[60, 7, 7, 41]])
SOUND = torch.linspace(-1, 1, 8 * 40).sin().reshape(1, 8, 40)


def llama() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=100, num_hidden_layers=2, pad_token_id=0, initializer_range=0.2, **sizes)
    )


def gpt2() -> nn.Module:
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=100, n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2, **tokens)
    )


def whisper() -> nn.Module:
    sides = {
        f"{side}_{what}": number
        for side in ("encoder", "decoder")
        for what, number in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 64))
    }
    lengths = {"max_source_positions": 20, "max_target_positions": 60, "num_mel_bins": 8, "d_model": 32}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    no_tokens = {"suppress_tokens": None, "begin_suppress_tokens": None}
    return WhisperForConditionalGeneration(
        WhisperConfig(vocab_size=100, init_std=0.2, **sides, **lengths, **tokens, **no_tokens)
    )


MODELS = {"llama": llama, "gpt2": gpt2, "whisper": whisper}
SERVERS: dict[str, type[GraphServer]] = {"graph": GraphServer, "openvino": OpenVinoServer}


@cache
def quantized(name: str) -> nn.Module:
    """A quantized model whose modules answer all calls."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    whole = {"input_features": SOUND, "decoder_input_ids": PROMPT} if name == "whisper" else {"input_ids": PROMPT}
    q = forced(model, pared.fit(model, PostTrainingQuantConfig(quant_level=0), [whole], quiet=True), "int8")
    serve(q, GraphServer(float_forms.outline_of))
    return on_modules(q)


@cache
def captures(_name: str) -> Captures:
    """Those of a model, for all tests."""
    return Captures()


def steps(model: nn.Module, prompt: Tensor, count: int = STEPS, caches: Any = None, **more: Any) -> tuple[Tensor, Any]:
    """The logits of greedy decoding, and the cache."""
    given: dict[str, Any] = {"use_cache": True, **more}
    if isinstance(model, WhisperForConditionalGeneration):
        heard = model.get_encoder()(SOUND.expand(len(prompt), -1, -1)).last_hidden_state
        given["encoder_outputs"] = BaseModelOutput(heard)
    name = "decoder_input_ids" if "encoder_outputs" in given else "input_ids"
    found, read = [], prompt
    with torch.no_grad():
        for _ in range(count):
            out = model(**{name: read}, past_key_values=caches, **given)
            assert caches is None or out.past_key_values is caches
            caches = out.past_key_values
            found.append(out.logits[:, -1])
            read = out.logits[:, -1:].argmax(-1)
            if "attention_mask" in given:
                given["attention_mask"] = torch.cat([given["attention_mask"], torch.ones_like(read)], 1)
    return torch.stack(found, 1), caches


@contextmanager
def kinds_noted(model: nn.Module) -> Iterator[dict[object, tuple[Argument, ...]]]:
    """The kinds of the calls that are made, each with the largest call."""
    seen: dict[object, tuple[Argument, ...]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = bind(parameters_of(module), args, kwargs)
        if bound is not None:
            seen[kind_of(bound)] = arguments_of(bound)

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    yield seen
    handle.remove()


@contextmanager
def served(q: nn.Module, form: str, use: Callable[[nn.Module], Any]) -> Iterator[GraphServer]:
    """The model with a graph for each kind of call that the use makes."""
    with kinds_noted(q) as seen:
        use(q)
    server = SERVERS[form](float_forms.outline_of, list(seen.values()), captures(type(q).__name__))
    q.__dict__[SERVER] = server
    try:
        yield server
    finally:
        on_modules(q)


@pytest.fixture(name="answered")
def _answered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which calls a graph answers."""
    found: list[str] = []
    for cls in (Graph, OpenVinoGraph):
        plain = cls.__call__

        def noted(self: Any, bound: Any, plain: Any = plain) -> Any:
            found.append("past" if any(name.endswith(".own.0.keys") for name in bound) else "first")
            return plain(self, bound)

        monkeypatch.setattr(cls, "__call__", noted)
    return found


def near(found: Tensor, expected: Tensor, most: float = 1e-2) -> bool:
    return bool((found - expected).square().sum() <= most * expected.square().sum())


@pytest.mark.parametrize("form", SERVERS)
@pytest.mark.parametrize("name", MODELS)
def test_steps_are_those_of_the_modules(name: str, form: str, answered: list[str]) -> None:
    q = quantized(name)
    expected, their_cache = steps(q, PROMPT)
    with served(q, form, lambda q: steps(q, PROMPT, 6)) as server:
        found, our_cache = steps(q, PROMPT)
        again, _ = steps(q, PROMPT)
    assert [graph.reason for graph in server._graphs.values()] == ["", ""]
    assert answered == ["first", *["past"] * (STEPS - 1)] * 2
    assert near(found, expected)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    assert torch.equal(again.argmax(-1), expected.argmax(-1))
    ours, theirs = container_of(our_cache), container_of(their_cache)
    assert ours is not None
    assert theirs is not None
    assert ours.layout == theirs.layout
    assert all(near(ours.tensors[part], theirs.tensors[part]) for part in theirs.tensors)
    assert our_cache.get_seq_length() == PROMPT.shape[1] + STEPS - 1


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampled": {"do_sample": True, "top_k": 5},
    "assisted by its own prompt": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("form", SERVERS)
@pytest.mark.parametrize("way", WAYS)
def test_generate(way: str, form: str, answered: list[str]) -> None:
    q: Any = quantized("llama")

    def generate(q: Any, prompt: Tensor = PROMPT) -> Tensor:
        torch.manual_seed(1)
        mask = torch.ones_like(prompt)
        given = {"max_new_tokens": STEPS, "do_sample": False, "attention_mask": mask} | WAYS[way]
        said: Tensor = q.generate(prompt, **given)
        return said

    expected = generate(q)
    with served(q, form, generate):
        assert torch.equal(generate(q), expected)
        assert torch.equal(generate(q), expected)
    assert "past" in answered


@pytest.mark.parametrize("form", SERVERS)
def test_a_batch_of_prompts_of_different_lengths(form: str, answered: list[str]) -> None:
    q: Any = quantized("llama")
    prompts = torch.tensor([[0, 0, 5, 71, 33], [9, 8, 90, 14, 11], [0, 3, 3, 62, 50]])

    def generate(q: Any) -> Tensor:
        said: Tensor = q.generate(
            prompts, attention_mask=(prompts != 0).long(), max_new_tokens=STEPS, do_sample=False, min_new_tokens=STEPS
        )
        return said

    expected = generate(q)
    with served(q, form, generate) as server:
        assert torch.equal(generate(q), expected)
        first, past = (graph.reason for graph in server._graphs.values())
    assert past == ""
    # What attends to nothing, such as padding before a text, is another number in OpenVINO: the modules read the texts.
    assert first == ("" if form == "graph" else "the graph does not give what the modules give")
    assert answered.count("past") == STEPS - 1


@pytest.mark.parametrize("form", SERVERS)
@pytest.mark.parametrize("name", MODELS)
def test_a_cache_that_is_cropped_and_used_for_another_prompt(name: str, form: str, answered: list[str]) -> None:
    q = quantized(name)

    def use(q: nn.Module) -> Tensor:
        first, caches = steps(q, PROMPT, 8)
        caches.crop(-5)
        after, caches = steps(q, OTHER[:, :1], 6, caches)
        then, _ = steps(q, OTHER, 4, caches)  # several tokens at once with a filled cache
        return torch.cat([first, after, then], 1)

    expected = use(q)
    with served(q, form, lambda q: steps(q, PROMPT, 6)):
        found = use(q)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    assert near(found, expected)
    assert answered.count("past") >= 7 + 6 + 3


def test_steps_are_made_once_while_it_is_not_known_what_is_fastest(answered: list[str]) -> None:
    q = quantized("llama")
    wanted, _ = steps(q, PROMPT, 6)
    with served(q, "graph", lambda model: steps(model, PROMPT, 6)) as server:
        kinds = server.wanted
        served_by = [Served("graph", kind) for kind in kinds]
        q.__dict__[SERVER] = SettlingServer(float_forms.outline_of, kinds, {"graph": server}, served_by)
        found, caches = steps(q, PROMPT, 6)
    assert near(found, wanted)
    assert caches.get_seq_length() == PROMPT.shape[1] + 5
    assert "past" in answered


def test_two_texts_at_a_time_and_threads(answered: list[str]) -> None:
    q = quantized("llama")
    expected = [steps(q, prompt)[0] for prompt in (PROMPT, OTHER)]
    with served(q, "graph", lambda q: steps(q, PROMPT, 6)):
        steps(q, PROMPT, 3)
        _, ours = steps(q, PROMPT, 9)
        _, theirs = steps(q, OTHER, 9)
        logits: list[list[Tensor]] = [[], []]
        read = [expected[i][:, 8:9].argmax(-1) for i in range(2)]
        for _ in range(8):
            for i, caches in enumerate((ours, theirs)):
                one, _ = steps(q, read[i], 1, caches)
                logits[i].append(one)
                read[i] = one[:, -1:].argmax(-1)
        for i in range(2):
            assert torch.equal(torch.cat(logits[i], 1).argmax(-1), expected[i][:, 9:17].argmax(-1))
        found: dict[int, Tensor] = {}

        def run(place: int) -> None:
            found[place] = steps(q, (PROMPT, OTHER)[place % 2])[0]

        threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(found[i].argmax(-1), expected[i % 2].argmax(-1)) for i in range(4))


class Other(DynamicCache):
    """A cache of a class of its own."""


def marked(caches: Any) -> Any:
    caches.mark = 1
    return caches


def updated_otherwise(caches: Any) -> Any:
    caches.layers[0].update = caches.layers[0].update
    return caches


REFUSED: dict[str, Callable[[Any], Any]] = {
    "a class of its own": lambda config: Other(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=40),
    "an attribute": lambda config: marked(DynamicCache(config=config)),
    "a method": lambda config: updated_otherwise(DynamicCache(config=config)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_other_caches_are_for_the_modules(what: str, answered: list[str]) -> None:
    q: Any = quantized("llama")
    expected, _ = steps(q, PROMPT, 6)
    with served(q, "graph", lambda q: steps(q, PROMPT, 6, DynamicCache(config=q.config))):
        found, _ = steps(q, PROMPT, 6, REFUSED[what](q.config))
        assert answered == []
        steps(q, PROMPT, 2, DynamicCache(config=q.config))
        assert answered == ["first", "past"]
    assert near(found, expected, 1e-6)


@pytest.mark.parametrize("what", ["sliding", "offloaded"])
def test_caches_that_do_more_are_not_known(what: str) -> None:
    config = quantized("llama").config
    if what == "sliding":
        config = copy.deepcopy(config)
        config.sliding_window, config.layer_types = 4, ["sliding_attention"] * 2
    found = DynamicCache(config=config)
    found.offloading = what == "offloaded"
    assert container_of(found) is None


def test_a_graph_that_is_wrong_leaves_what_the_modules_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    q: Any = quantized("llama")
    expected, their_cache = steps(q, PROMPT, 3)
    plain = Graph.__call__

    def wrong(self: Graph, bound: Any) -> Any:
        out = plain(self, bound)
        out.past_key_values.layers[1].keys = out.past_key_values.layers[1].keys * 2
        return out

    with served(q, "graph", lambda q: steps(q, PROMPT, 6)) as server:
        monkeypatch.setattr(Graph, "__call__", wrong)
        found, our_cache = steps(q, PROMPT, 3)
    assert {graph.reason for graph in server._graphs.values()} == {"the graph does not give what the modules give"}
    assert torch.equal(found, expected)
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(our_cache.layers, their_cache.layers, strict=True))


@pytest.mark.whole_models_are_timed
def test_fit_times_steps_and_what_it_chose_is_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = llama().eval()

    def generate(model: Any) -> Tensor:
        said: Tensor = model.generate(PROMPT, max_new_tokens=STEPS, do_sample=False)
        return said

    q = pared.fit(model, PostTrainingQuantConfig(quant_level=0), generate, quiet=True)
    calls = record_of(q).profile.model.calls
    held = [[argument.holds for argument in call.arguments if argument.holds] for call in calls]
    assert ["DynamicCache(2)"] in held
    assert ["DynamicCache(2, filled)"] in held
    assert all(call.graph_ms and call.openvino_ms for call in calls if call.arguments)
    lengths = [{a.name: a.shape for a in call.arguments}.get("past_key_values.own.0.keys") for call in calls]
    assert max(shape[2] for shape in lengths if shape) >= PROMPT.shape[1] + STEPS - 3
    expected = generate(q)
    pared.save(q, tmp_path)
    loaded = pared.load(tmp_path, model=llama())
    for other in (loaded, copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        assert record_of(other).profile == record_of(q).profile
        assert torch.equal(generate(other), expected)


@pytest.mark.parametrize(
    "made",
    [
        lambda: DynamicCache(),
        lambda: DynamicCache([(torch.ones(1, 2, 3, 4), torch.zeros(1, 2, 3, 4))] * 2),
        lambda: DynamicCache(config=quantized("llama").config),
        lambda: EncoderDecoderCache(DynamicCache(), DynamicCache()),
        lambda: BaseModelOutput(torch.ones(1, 2), attentions=None),
    ],
    ids=["new", "filled", "of a model", "pair", "output"],
)
def test_what_is_known_of_an_object_makes_another_like_it(made: Callable[[], Any]) -> None:
    held = container_of(made())
    assert held is not None
    assert layout_from(str(held.layout)) == held.layout
    again = container_of(held.layout.made(list(held.tensors.values())))
    assert again is not None
    assert again.layout == held.layout
    assert all(again.tensors[name] is tensor for name, tensor in held.tensors.items())
    if held.is_cache:
        assert renewed(held.held) is not held.held


@pytest.mark.parametrize("text", ["DynamicCache", "DynamicCache(-1)", "DynamicCache(1001)", "a.b(c)", "A(b, b)", "A()"])
def test_other_texts_are_no_layout(text: str) -> None:
    assert layout_from(text) is None


@pytest.mark.parametrize("name", ["ModelOutput", "OrderedDict", "dataclass", "torch", "Nothing"])
def test_only_outputs_are_made_by_name(name: str) -> None:
    with pytest.raises((LookupError, TypeError)):
        Layout(output=name, fields=("x",)).made([torch.ones(1)])
