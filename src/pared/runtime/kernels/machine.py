"""What this machine can compute, found by trying: flags and environment variables can contradict each other."""

from __future__ import annotations

import functools
import os
from typing import Any, Final

import torch
from torch import Tensor

from pared.errors import reason_of

FULL_LEVELS: Final = 255
"""The largest activation code where the kernel's sums are exact."""

SAFE_LEVELS: Final = 127
"""The largest activation code where sums of two products saturate at 16 bits: 127 * (127 + 127) <= 32767."""

_SMALL_CODE: Final = 64  # 255 * (64 + 64) <= 32767: weights this small never saturate

# The last arguments of every kernel (scale, zero point and type of the output, activation), for plain floats.
PLAIN: Final[tuple[Any, ...]] = (1.0, 0, torch.float32, "none", [], "")

_OPERATORS: Final = (
    "qlinear_prepack",
    "qlinear_pointwise",
    "qconv_prepack",
    "qconv1d_pointwise",
    "qconv2d_pointwise",
    "qconv3d_pointwise",
)


def operator_of(namespace: str, name: str, overload: str = "default") -> Any:
    """An operator of PyTorch; None if this build lacks it.

    >>> operator_of("onednn", "no_such_operator") is None
    True
    """
    packet = getattr(getattr(torch.ops, namespace), name, None)
    return getattr(packet, overload, None)


@functools.cache
def available() -> str:
    """Why the int8 kernels cannot run here, in words; empty if they can.

    >>> available() == "" or "int8" in available() or "oneDNN" in available()
    True
    """
    if not torch.backends.mkldnn.is_available():
        return "this build of PyTorch has no oneDNN"
    missing = [name for name in _OPERATORS if not hasattr(torch.ops.onednn, name)]
    if missing:
        return f"this build of PyTorch lacks the int8 operator onednn::{missing[0]}"
    # Elsewhere the operators may exist, but run oneDNN's reference code, which is about 500 times slower.
    capability = torch.backends.cpu.get_cpu_capability()
    if not capability.startswith("AVX"):
        return f"the int8 kernels need an x86 CPU with AVX2, and PyTorch reports {capability}"
    try:
        right = _largest_sums_are_right(SAFE_LEVELS)
    except RuntimeError as error:
        return f"oneDNN refuses an int8 product: {reason_of(error)}"
    return "" if right else "oneDNN computes a wrong int8 product"


@functools.cache
def exact_products() -> bool:
    """Whether u8 * s8 products are summed exactly, as on CPUs with VNNI.

    Other CPUs saturate the sums of two products at 16 bits. This is measured, not read from CPU flags, because
    `ONEDNN_MAX_CPU_ISA` can switch VNNI off. Only meaningful if `available()` is empty.
    """
    return _largest_sums_are_right(FULL_LEVELS)


def extensions() -> list[str]:
    """The processor's extensions for products of codes or bfloat16 that PyTorch reports and oneDNN may use.

    They decide what is fast, never what is right, so flags are good enough here.
    """
    names = ["vnni", "avx512_bf16", "amx_tile"]
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    if limit not in ("ALL", "DEFAULT") and "AMX" not in limit:
        names.remove("amx_tile")
    return [name for name in names if getattr(torch.cpu, f"_is_{name}_supported", bool)()]


def without_bfloat16() -> str:
    """Why bfloat16 is not worth trying here, in words; empty if it is.

    Where PyTorch finds AVX2 only, oneDNN converts every number: linear layers take up to ten times as long as in
    float32, convolutions a hundred times. With AVX512 alone it is a matter of measurement.

    >>> without_bfloat16() in ("", "this processor has no instructions for it")
    True
    """
    lacks = torch.backends.cpu.get_cpu_capability() == "AVX2" and not {"avx512_bf16", "amx_tile"} & set(extensions())
    return "this processor has no instructions for it" if lacks else ""


def has_tiles() -> bool:
    """Whether products run on tiles (AMX)."""
    return "amx_tile" in extensions()


def levels_for(codes: Tensor) -> int:
    """The largest activation code at which products with these int8 weight codes are exact: 255 or 127.

    Without VNNI a kernel adds two products in 16 bits, so codes beyond 64 leave room for 7-bit activations only. The
    weight codes never change: the same file runs everywhere.

    >>> levels_for(torch.tensor([[64, -64]], dtype=torch.int8))
    255
    """
    if not codes.numel() or exact_products():
        return FULL_LEVELS
    low, high = (int(code) for code in codes.aminmax())
    return FULL_LEVELS if max(-low, high) <= _SMALL_CODE else SAFE_LEVELS


def _largest_sums_are_right(level: int) -> bool:
    """Whether the kernel adds 64 products of `level` and 127 correctly."""
    depth, rows = 64, 16
    codes = torch.full((rows, depth), 127, dtype=torch.int8, device="cpu")
    sums = torch.ops.onednn.qlinear_pointwise.default(
        torch.full((4, depth), level, dtype=torch.uint8, device="cpu"),
        1.0,
        0,
        torch.ops.onednn.qlinear_prepack.default(codes, None),
        torch.ones(rows, dtype=torch.float32, device="cpu"),
        torch.zeros(rows, dtype=torch.int32, device="cpu"),
        None,
        *PLAIN,
    )
    return bool((sums == float(depth * level * 127)).all())


# glibc's DEFAULT_MMAP_THRESHOLD_MAX, less room for its own header.
_LARGEST_KEPT: Final = (32 << 20) - (1 << 16)


@functools.cache
def keep_freed_memory() -> None:
    """Let the C library keep the memory of freed activations for the next ones; once per process.

    glibc returns every freed block above a threshold to the system, and each page of the next block then costs a page
    fault. The threshold grows, up to 32 MiB, when a larger block than before is freed: so one is made and freed here,
    untouched. With other C libraries this does nothing. It saves a third of the time of an int8 encoder
    (`docs/decisions/004-freed-memory.md`).
    """
    torch.empty(_LARGEST_KEPT, dtype=torch.uint8, device="cpu")
