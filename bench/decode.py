"""Greedy decoding of a language model, a token at a time: ours in each form, and llama.cpp's Q8_0, alternately.

All matrices are rounded to the nearest int8 codes, inputs are dynamic: nothing is fitted first (`make bench-decode`).
The model is SmolLM2, or that of a Hugging Face folder: Qwen2.5-1.5B takes 6 GB in float, and more for its forms.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from bench.calls import kinds_noted
from bench.markdown import markdown
from bench.zoo import smollm2 as zoo
from pared import compress
from pared.fitting.rounding.nearest import nearest
from pared.formats.activation import Activation
from pared.formats.coded import Raw, dtype_name
from pared.formats.views import View
from pared.model.contents import Contents, Decision, Stored
from pared.model.tensors import find_tensors
from pared.runtime import float_forms
from pared.runtime.graphs.capturing import kept
from pared.runtime.openvino.graph import is_installed
from pared.runtime.profile.profile import Profile, this_machine
from pared.runtime.quantized import assemble
from pared.runtime.serving.graph_server import GraphServer
from pared.runtime.serving.openvino_server import OpenVinoServer
from pared.runtime.serving.served import SERVER, on_modules

_PROMPT, _TOKENS = 16, 32
_Q8_0 = 8.6  # bits of a weight in Q8_0, and of norms in float32 besides
_OURS = ("modules", "graph", "OpenVINO")


def quantized(model: nn.Module) -> nn.Module:
    """The model at 8 bits, whose modules answer all calls."""
    tensors, stored = find_tensors(model), []
    for one in tensors:
        value, is_matrix = one.tensor.detach(), one.tensor.dim() == 2
        view = View(tuple(value.shape), (0,))
        coded = nearest(value, 8, view) if is_matrix else Raw(dtype_name(value.dtype)).encode(value)
        decision = Decision(one.name, "grid" if is_matrix else "exact", 8.0 if is_matrix else None, "")
        kind: Any = "parameter" if isinstance(one.tensor, nn.Parameter) else "buffer"
        stored.append(Stored(tuple(one.names), kind, coded, decision))
    modes: Mapping[type[nn.Module], Any] = {nn.Linear: "dynamic", nn.Embedding: "gather"}
    activations = {name: Activation(modes[type(one)]) for name, one in model.named_modules() if type(one) in modes}
    return on_modules(assemble(tensors, Contents(tuple(stored), activations), Profile(this_machine())))


def servers(model: nn.Module, use: Callable[[], object], forms: Collection[str]) -> dict[str, GraphServer | None]:
    """What answers the calls that a use makes, by the name of the form; of the forms that there are here."""
    with kinds_noted(model) as seen:
        use()
    calls = list(seen.values())
    made: dict[str, GraphServer | None] = {
        "modules": None,
        "graph": GraphServer(float_forms.outline_of, calls, kept.captured),
    }
    if is_installed():
        made["OpenVINO"] = OpenVinoServer(float_forms.outline_of, calls, kept.captured)
    return {name: server for name, server in made.items() if name in forms}


def llama_cpp(source: Path | None, folder: Path, threads: int) -> nn.Module:
    """The same model in llama.cpp, in blocks of Q8_0; that of a folder as our exporter writes it."""
    from bench.peers.workers.llamacpp import PEERS, Engine

    if source is not None:
        if source.suffix != ".gguf":
            compress(source, folder / "model", bits=_Q8_0, target="gguf", quiet=True)
            (source,) = (folder / "model").glob("*.gguf")
        return Engine(source, threads)
    task: Any = SimpleNamespace(folder=folder, threads=threads)
    PEERS["llamacpp-q8"].compress(task, zoo.weights_of_file())
    return PEERS["llamacpp-q8"].reload(task)


def loaded(folder: Path | None) -> nn.Module:
    """The float model."""
    if folder is None:
        return zoo.load()
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def bandwidth(nbytes: int) -> Callable[[], object]:
    """Reads as many bytes as a token needs of the weights."""
    memory = torch.ones(nbytes // 8, dtype=torch.int64)
    return lambda: memory.sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="a model of transformers; default: SmolLM2")
    parser.add_argument("--gguf", type=Path, help="the folder's model in Q8_0; default: it is written first")
    parser.add_argument("--forms", default=",".join(_OURS), help="those of ours that are measured, with commas between")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = quantized(loaded(options.folder))
    prompt = zoo.windows("test", 0, 1, _PROMPT)[0, :-1]  # to another model than SmolLM2, a text like any other
    with tempfile.TemporaryDirectory() as folder:
        engine = llama_cpp(options.gguf or options.folder, Path(folder), options.threads)
    weights = sum(buffer.numel() for buffer in model.buffers() if buffer.dtype is torch.int8)
    inner: Any = model
    if not inner.config.tie_word_embeddings:  # a token reads all matrices but a table, of which it takes one row
        weights -= inner.get_input_embeddings().weight.numel()

    def ours(server: GraphServer | None, count: int) -> Tensor:
        model.__dict__[SERVER] = server
        return zoo.decode(model, prompt, count)

    runs: dict[str, Callable[[int], object]] = {}
    for name, server in servers(model, lambda: zoo.decode(model, prompt, 2), options.forms.split(",")).items():
        ours(server, 2)
        for graph in server._graphs.values() if server is not None else ():
            print(f"{name}: {graph.reason or 'answers'}")
        runs[name] = lambda count, server=server: ours(server, count)  # type: ignore[misc]  # mypy sees no default
    runs["llama.cpp Q8_0"] = lambda count: zoo.decode(engine, prompt, count)
    read = bandwidth(weights)
    runs["reading all weights once"] = lambda count: [read() for _ in range(count - 1)]
    times: dict[str, list[tuple[float, float]]] = {}
    for _ in range(options.rounds):
        for name, run in runs.items():
            begun = _clocks()
            run(1)
            between = _clocks()
            run(_TOKENS)
            end = _clocks()
            # What the prompt takes is subtracted, with the first token.
            spent = [(c - b - (b - a)) / (_TOKENS - 1) for a, b, c in zip(begun, between, end, strict=True)]
            times.setdefault(name, []).append((spent[0], spent[1]))
    rows = []
    least = {name: min(cpu for cpu, _ in found) for name, found in times.items()}
    for name, found in times.items():
        cpu, wall = (statistics.median(each) for each in zip(*found, strict=True))
        shares = [f"{least[other] / least[name]:.2f}" for other in ("llama.cpp Q8_0", "reading all weights once")]
        rows.append([name, f"{1e3 * least[name]:.2f}", f"{1e3 * cpu:.2f}", f"{1e3 * wall:.2f}", *shares])
    print(f"{options.threads} threads, {weights:,} weights, {_TOKENS} tokens after {_PROMPT}")
    heads = ("", "processor ms a token, least", "median", "wall, median", "llama.cpp / this", "reading / this")
    print(markdown(heads, rows))


def _clocks() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


if __name__ == "__main__":
    main()
