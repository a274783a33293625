"""A sample of the architectures of transformers, through everything; `make bench-architectures` takes all of them."""

import pytest

pytest.importorskip("transformers")

from bench.architectures.measure import LEAST_DECIBELS, measure
from bench.architectures.small import SIZES, architectures
from bench.architectures.table import LEAST_OF_WEIGHTS

# One of each kind: encoders, decoders, both, experts, states in place of attention, images, sound, several inputs.
SAMPLE = (
    *("bert", "deberta-v2", "electra", "albert", "gpt2", "gptj", "llama", "qwen3", "phi3", "gemma2", "opt", "bloom"),
    *("t5", "bart", "m2m_100", "mixtral", "qwen2_moe", "mamba", "vit", "convnext", "segformer", "clip", "whisper"),
    *("wav2vec2", "distilbert"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_an_architecture_goes_through_everything(name: str) -> None:
    row = measure(name)
    assert row.error == ""
    assert row.equal is True
    assert row.generates is not False
    assert row.nbytes < 0.5 * row.source_bytes
    assert row.sqnr > LEAST_DECIBELS or (row.weights_sqnr or 0) < LEAST_OF_WEIGHTS


def test_the_sample_is_of_those_that_are_there() -> None:
    assert len(set(SAMPLE)) == 25
    assert set(SAMPLE) <= set(architectures())
    assert len({names for _, names in SIZES}) == len(SIZES)
