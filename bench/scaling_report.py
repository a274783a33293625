"""The tables and the plot of `make bench-scaling`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.markdown import markdown
from bench.scaling import BATCH, SAMPLED, SAMPLES, TOKENS

PLOT = Path("docs/scaling.svg")


def whole(found: Mapping[str, Any]) -> str:
    rows = [line for size, each in found["sizes"].items() for line in _lines(size, each, found["limits"])]
    columns = ("parameters", "threads", "file MB", "fit s", "GB", "save s", "load s", "GB ")
    shapes = (
        f"1 x {TOKENS}: ms, of FP32",
        f"{BATCH} x {TOKENS}: ms, of FP32",
        "of the int8 peak",
        "load, of a copy's speed",
    )
    parts = [markdown((*columns, *shapes), rows), _limits(found["limits"])]
    if found["samples"]:
        parts.append(_samples(found["samples"]))
    machine = found["machine"]
    parts.append(
        f"8 bits, {SAMPLES} samples of {TOKENS} tokens. GB: what the process grew by to its peak. Machine: "
        f"{machine['processor']}, {machine['memory'] / 2**30:.0f} GiB, {machine['capability']}."
    )
    return "\n\n".join([*parts, "![time by size](scaling.svg)"])


def _lines(size: str, each: Mapping[str, Any], limits: Mapping[str, Any]) -> list[tuple[str, ...]]:
    if "error" in each:
        return [(f"{float(size):.0e}", "-", each["error"], *["-"] * 9)]
    return [_line(size, threads, one, limits[threads]) for threads, one in each.items()]


def _line(size: str, threads: str, one: Mapping[str, Any], limit: Mapping[str, float]) -> tuple[str, ...]:
    if "error" in one:
        return (f"{float(size):.0e}", threads, one["error"], *["-"] * 9)
    peaks = [f"{(one[f'{what}_peak'] - one[f'{what}_before']) / 1e9:.2f}" for what in ("fit", "load")]
    times = [one[f"batch_{batch}"] for batch in (1, BATCH)]
    ratios = [f"{t['ours']['median']:.1f}, {t['ours']['median'] / t['float32']['median']:.2f}" for t in times]
    rate = 2 * one["products"] * BATCH * TOKENS / (times[1]["ours"]["median"] / 1e3)
    share = f"{rate / limit['int8']:.0%}" if "int8" in limit else "-"
    speed = 4 * one["parameters"] / one["load"] / limit["copy"]  # what is loaded are floats in the end
    return (
        *(f"{one['parameters'] / 1e6:.1f} M", threads, f"{one['bytes'] / 1e6:.1f}", f"{one['fit']:.1f}", peaks[0]),
        *(f"{one['save']:.2f}", f"{one['load']:.2f}", peaks[1], *ratios, share, f"{speed:.1%}"),
    )


def _limits(limits: Mapping[str, Mapping[str, float]]) -> str:
    rows = [
        (threads, *(f"{one[name] / 1e9:.0f}" if name in one else "-" for name in ("int8", "float32", "copy")))
        for threads, one in limits.items()
    ]
    return markdown(("threads", "int8 product, Gop/s", "float32 product, Gop/s", "copy, GB/s"), rows)


def _samples(found: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        (samples, one["error"], "-")
        if "error" in one
        else (samples, f"{one['fit']:.1f}", f"{(one['fit_peak'] - one['fit_before']) / 1e9:.2f}")
        for samples, one in found.items()
    ]
    return markdown((f"samples, {SAMPLED / 1e6:.0f} M parameters", "fit s", "GB"), rows)


def draw(found: Mapping[str, Any]) -> None:
    """Seconds and gigabytes against parameters, on logarithmic axes."""
    import matplotlib as mpl  # only the bench has it, and only where it draws

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "pared"  # the same file for the same figures
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6))
    colors = {"fit": "C0", "save": "C1", "load": "C2", "float32": "C3", "ours": "C4"}
    for threads, style in (("1", "o--"), ("2", "o-")):
        known = [each[threads] for each in found["sizes"].values() if "error" not in each.get(threads, {"error": ""})]
        across = [one["parameters"] for one in known]
        named = threads == "2"
        for what in ("fit", "save", "load"):
            left.plot(across, [one[what] for one in known], style, color=colors[what], label=what if named else None)
        for name in ("float32", "ours"):
            taken = [one[f"batch_{BATCH}"][name]["median"] / 1e3 for one in known]
            label = f"a call of {BATCH} x {TOKENS} tokens, {name}" if named else None
            left.plot(across, taken, style, color=colors[name], label=label)
        for what in ("fit", "load"):
            grown = [max((one[f"{what}_peak"] - one[f"{what}_before"]) / 1e9, 1e-3) for one in known]
            right.plot(across, grown, style, color=colors[what], label=what if named else None)
    right.plot(across, [4 * one / 1e9 for one in across], "k:", label="the floats themselves")
    left.set(xlabel="parameters", ylabel="seconds", xscale="log", yscale="log")
    right.set(xlabel="parameters", ylabel="GB, what the process grew by", xscale="log", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, title="2 threads; dashed: 1", title_fontsize=7)
    figure.tight_layout()
    figure.savefig(PLOT, metadata={"Date": None})
