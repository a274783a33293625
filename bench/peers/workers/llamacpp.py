"""llama.cpp, through the package xllamacpp: every matrix in blocks of Q8_0, in a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import xllamacpp
from gguf import GGMLQuantizationType, GGUFValueType
from torch import Tensor, nn

from bench.peers.peer import Peer, Task
from bench.zoo import smollm2

_FILE = "model.gguf"
_CONTEXT = 512  # tokens
_BYTES = 256  # of a text that stands for its tokens
_MOSTLY_Q8 = 7  # the file's own name for its type
# A token of whole characters, which is said whatever is likely: of one that ends within a character, the server says
# neither text nor probabilities. These come from the logits, before any token is chosen.
_SAID = [[260, 1000.0]]
_LEFT_OUT = ("GGUF.", "general.architecture")  # what the writer adds itself


class Engine(nn.Module):
    """A server in this process, with the methods that `bench.zoo.smollm2` calls."""

    def __init__(self, file: Path, threads: int) -> None:
        super().__init__()
        settings = xllamacpp.CommonParams()
        settings.model.path = str(file)
        settings.n_ctx = _CONTEXT
        settings.n_parallel = 1
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        self.server = xllamacpp.Server(settings)

    def pared_bench_decode(self, prompt: Tensor, count: int) -> Tensor:
        """The text's characters rather than tokens, which an answer only has at the price of sorting all of them."""
        answer = self._complete(prompt, n_predict=count, ignore_eos=True, cache_prompt=False)
        said = answer["text"].encode()[:_BYTES]
        return torch.tensor([*said, *bytes(_BYTES - len(said))])

    def pared_bench_read(self, texts: Tensor, last: int) -> Tensor:
        """Token by token: what a text has in common with the one before stays in the cache."""
        vocabulary = len(smollm2.file().fields["tokenizer.ggml.tokens"].contents())
        found = []
        for text in texts:
            for end in range(text.shape[0] - last, text.shape[0]):
                answer = self._complete(
                    text[:end], n_predict=1, n_probs=vocabulary, logit_bias=_SAID, ignore_eos=True, cache_prompt=True
                )
                row = torch.full((vocabulary,), -torch.inf)
                likely = answer["logprobs"]["content"][0]["top_logprobs"]
                row[[one["id"] for one in likely]] = torch.tensor([one["logprob"] for one in likely])
                found.append(row)
        return torch.stack(found).log_softmax(-1)

    def _complete(self, prompt: Tensor, **options: Any) -> dict[str, Any]:
        request = {"prompt": prompt.tolist(), "temperature": 0, **options}
        answer: dict[str, Any] = self.server.handle_completions(request)["choices"][0]
        return answer


class Q8(Peer):
    settings = "`gguf` writes Q8_0 for every matrix; `xllamacpp.Server`, greedy"

    def prepare(self, task: Task) -> dict[str, Tensor]:  # noqa: ARG002  # there is one model only
        return smollm2.weights_of_file()

    def compress(self, task: Task, prepared: dict[str, Tensor]) -> None:
        source, writer = smollm2.file(), gguf.GGUFWriter(task.folder / _FILE, "llama")
        for key, field in source.fields.items():
            if key.startswith(_LEFT_OUT):
                continue
            value = _MOSTLY_Q8 if key == "general.file_type" else field.contents()
            kind = field.types[0]
            writer.add_key_value(key, value, kind, field.types[-1] if kind == GGUFValueType.ARRAY else None)
        for name, weight in prepared.items():
            values = weight.numpy().astype(np.float32)
            if values.ndim == 1:
                writer.add_tensor(name, values)
            else:
                codes = gguf.quants.quantize(values, GGMLQuantizationType.Q8_0)
                writer.add_tensor(name, codes, raw_dtype=GGMLQuantizationType.Q8_0)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def save(self, task: Task, compressed: Any) -> None:
        """It is written as it is converted."""

    def module(self, task: Task, compressed: Any) -> nn.Module:  # noqa: ARG002  # the file is the model
        return self.reload(task)

    def reload(self, task: Task) -> nn.Module:
        return Engine(task.folder / _FILE, task.threads)


PEERS: dict[str, Peer] = {"llamacpp-q8": Q8()}
