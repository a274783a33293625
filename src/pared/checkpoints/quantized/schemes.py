"""How quantizers name what they store, and the names of their methods in configurations."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

# What quantizers store codes as: whole numbers, often several in one, and floats of eight bits and less.
INTEGERS: Final = frozenset(
    ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int4", "uint4", "int2", "uint2")
)  # fmt: skip
NARROW_FLOATS: Final = frozenset(
    ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float4_e2m1fn_x2", "float4_e2m1")
)  # fmt: skip


@dataclass(frozen=True)
class Scheme:
    """How one method names the tensors of a weight.

    Args:
        label: the method's name, for people.
        codes: the pattern of the name of the codes; what its groups matched stands in `beside` as `{0}`, `{1}`.
        beside: names of which one must be there as well, for these codes.
    """

    label: str
    codes: re.Pattern[str]
    beside: tuple[str, ...]


def _scheme(label: str, codes: str, *beside: str) -> Scheme:
    return Scheme(label, re.compile(codes), beside)


# The first that fits gives the label. A name ends after the last dot or slash, or in a longer word of the method.
SCHEMES: Final[tuple[Scheme, ...]] = (
    _scheme("GPTQ", r"(.*)\bqweight", "{0}g_idx"),
    _scheme("AWQ", r"(.*)\bqweight", "{0}qzeros"),
    _scheme("GPTQ", r"(.*)\bqweight", "{0}scales"),
    _scheme("EXL2", r"(.*)\bq_weight", "{0}q_scale"),
    _scheme("bitsandbytes, 4 bits", r"(.*)", "{0}.absmax", "{0}.quant_map"),
    _scheme("bitsandbytes, 8 bits", r"(.*)\bweight", "{0}SCB", "{0}weight.SCB"),
    _scheme("HQQ", r"(.*)\bW_q", "{0}scale", "{0}zero", "{0}meta/scale", "{0}meta/zero", "{0}meta.scale"),
    _scheme("EETQ", r"(.*)\bq?weight", "{0}weight_scales"),
    _scheme("AQLM", r"(.*)\bcodes", "{0}codebooks"),
    _scheme("QuIP#", r"(.*)\bQidxs", "{0}SU", "{0}SV"),
    _scheme("VPTQ", r"(.*)\bindices", "{0}centroids", "{0}centroids.weight"),
    _scheme("compressed-tensors", r"(.*)weight_packed", "{0}weight_scale", "{0}weight_shape"),
    _scheme("FP8", r"(.*)weight", "{0}weight_scale_inv"),
    _scheme("MXFP4", r"(.*)_blocks", "{0}_scales"),
    _scheme("quanto", r"(.*)\._data", "{0}._scale"),
    _scheme("torchao", r"(.*)weight_qdata", "{0}weight_scale"),
    _scheme("torchao", r"(.*)[:.](?:_data|int_data|qdata|tensor_impl.*data)", "{0}:_scale", "{0}:scale", "{0}.scale"),
    _scheme("ONNX in integers", r"(.*)_quantized", "{0}_scale"),
    _scheme("pared", r"(.*)\.codes", "{0}.steps"),
    _scheme("pared", r"(.*)", "{0}_step"),
    _scheme("INC", r"(.*)\bpacked_weight", "{0}scale", "{0}scales"),
    # Of no tool in particular: codes with a scale of the same name.
    _scheme("", r"(.*)\b(q?weight\w*|w[12])", "{0}{1}_scale", "{0}{1}_scales", "{0}{1}.scale", "{0}{1}.scales"),
    _scheme("", r"(.*)\b(q?weight)(?:_int8|_q|_codes|_quantized)?", "{0}weight_scale", "{0}scales", "{0}weight.scales"),
    _scheme("", r"(.*)", "{0}_scale_inv", "{0}_absmax", "{0}_zero_point"),
)

# `quant_method` of a `quantization_config`, as people know it.
METHODS: Final[Mapping[str, str]] = {
    "gptq": "GPTQ", "awq": "AWQ", "bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed-tensors",
    "fp8": "FP8", "fbgemm_fp8": "FP8", "hqq": "HQQ", "eetq": "EETQ", "mxfp4": "MXFP4", "auto-round": "AutoRound",
    "intel/auto-round": "AutoRound", "torchao": "torchao", "quanto": "quanto", "aqlm": "AQLM", "vptq": "VPTQ",
    "spqr": "SpQR", "higgs": "HIGGS", "bitnet": "BitNet", "quark": "Quark", "modelopt": "ModelOpt", "inc": "INC",
}  # fmt: skip
