"""`make results-docs`: put the figures of the last runs of the benches into the pages of results and the front picture.

Each bench has its own place in `docs/results.md` or `docs/results/more.md`, between a mark that names its command and a
mark of the end; where a bench has not been run, what stands there stays.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import compress, damage, figures, front, graphs, layers, page, run, scaling, scaling_report, search, tensors
from bench.ablation import __main__ as ablation
from bench.architectures import __main__ as architectures
from bench.architectures import table
from bench.markdown import markdown
from bench.peers import __main__ as peers
from bench.peers import tables

RESULTS, MORE = Path("docs/results.md"), Path("docs/results/more.md")
ARCHITECTURES = Path("docs/results/architectures.md")
# What users ask first stands on the page of results; all else is one page behind it.
PAGES = {"make bench-peers": RESULTS}
PAGES |= {"make bench-architectures": ARCHITECTURES}
MARKS = r"(<!-- results: {} -->\n).*?(<!-- end of results -->)"


def job(found: Mapping[str, Any]) -> str:
    m, d = found["minilm"], found["dual_path"]
    fast, small = m["speed_8x128"], m["speed_1x32"]
    size = d["float_bytes"]

    def ratio(a: Mapping[str, float], b: Mapping[str, float]) -> str:
        return f"{a['median'] / b['median']:.2f} ({a['median']:.1f} ms / {b['median']:.1f} ms)"

    loading, memory = m["loading"], m["memory"]
    sizes = f"{m['weight_only_bytes'] / 1e6:.2f} MB of {m['float_bytes'] / 1e6:.1f}"
    rows = [
        ("MiniLM at 8 bits, `best_model.pt`", sizes),
        ("mean 1 - cosine on the Lee documents, weight-only", f"{m['distance_weight_only']:.5f}"),
        ("the same with int8 kernels", f"{m['distance_int8']:.5f}"),
        ("8 x 128 tokens, int8 / float32", ratio(fast["pared"], fast["float32"])),
        ("8 x 128 tokens, bfloat16 / float32", ratio(fast["bfloat16"], fast["float32"])),
        ("1 x 32 tokens, int8 / float32", ratio(small["pared"], small["float32"])),
        ("1 x 32 tokens, int8 / bfloat16", ratio(small["pared"], small["bfloat16"])),
        ("load: ours / torch.load + load_state_dict", ratio(loading["pared"], loading["torch"])),
        ("resident memory, weight-only / float32", f"{memory['weight_only'] / memory['float']:.2f}"),
        ("resident memory, int8 / float32", f"{memory['int8'] / memory['float']:.2f}"),
        ("`import pared`, all names, beyond torch", f"{m['import_seconds']:.2f} s"),
        ("`fit` at 8 bits on MiniLM, 100 documents", f"{m['fit_seconds']:.1f} s"),
        ("dual-path RNN, `best_model.pt`", f"{d['artifact_bytes'] / size:.3f} of {size / 1e6:.1f} MB"),
        ("dual-path RNN, `torch.save(model)`", f"{d['object_bytes'] / size:.3f}"),
        ("dual-path RNN, `torch.save(model.state_dict())`", f"{d['state_bytes'] / size:.3f}"),
        ("dual-path RNN, output SNR", f"{d['snr']:.1f} dB"),
    ]  # fmt: skip
    if e := found.get("effnet"):
        photos = f"{e['bytes'] / e['float_bytes']:.3f} of {e['float_bytes'] / 1e6:.1f} MB"
        kl = f"{e['kl_weight_only']:.4f} / {e['kl_int8']:.4f} nat"
        rows += [
            ("EfficientNet-Lite0 at 8 bits, `best_model.pt`", photos),
            ("its KL to FP32 on unseen photos, weight-only / int8", kl),
            ("its time for one photo, ours / float32", ratio(e["speed"]["pared"], e["speed"]["float32"])),
        ]
    return markdown(("what", "measured"), rows)


def job_and_machine(found: Mapping[str, Any]) -> str:
    machine = found["machine"]
    kernels = ", ".join(f"{count} {kernel}" for kernel, count in found["minilm"]["kernels"].items())
    return (
        f"{job(found)}\n\nMedians of interleaved runs in one process, {run.THREADS} threads. Machine: "
        f"{machine['processor']}, {machine['capability']}, torch {machine['torch']}, Python {machine['python']}. "
        f"Kernels of MiniLM's tensors: {kernels}."
    )


def searches(found: Mapping[str, Any]) -> str:
    runs = sorted((search.read(record) for record in found.values()), key=lambda run: (run.name, run.seed))
    rows = [
        (
            *(r.name, str(r.seed), f"{r.float_bytes / 1e6:.2f}", f"{r.nbytes / 1e6:.3f}", f"{r.ratio:.2f}"),
            *(str(r.evaluations), f"{r.fit_seconds:.0f}", f"{r.peak / 1e9:.2f}", f"{r.tolerance:.4f}"),
            *(
                f"{r.search.value:.4f}",
                f"{r.test.value:.4f} ± {2 * r.test.error:.4f}",
                "yes" if r.test_met else "**no**",
            ),
        )
        for r in runs
    ]
    mean = _mean(r.ratio for r in runs)
    notes = [
        f"* {r.name}, seed {r.seed} ({r.note}): "
        + "; ".join(f"{what} {_four(r.metrics_float[what])} -> {_four(value)}" for what, value in r.metrics.items())
        for r in runs
    ]
    kept = [f"{r.name}, seed {r.seed}: `{name}` ({why})" for r in runs for name, why in r.floats.items()]
    return (
        f"{markdown(search.COLUMNS, rows)}\n\nGeometric mean of FP32 / file over {len({r.name for r in runs})} models "
        f"and {len(runs)} runs: {mean:.2f}; missed on the test set: {sum(not r.test_met for r in runs)}.\n\n"
        f"Tensors of two or more dimensions left in floats: {'; '.join(kept) or 'none'}.\n\n" + "\n".join(notes)
    )


def _four(value: float) -> str:
    return f"{round(value, 4) + 0.0:.4f}"  # without a minus before zero


def _mean(ratios: Iterable[float]) -> float:
    """Their geometric mean."""
    logs = [math.log(ratio) for ratio in ratios]
    return math.exp(sum(logs) / len(logs))


def at_sizes(found: Mapping[str, Any]) -> str:
    parts = []
    if "minilm" in found:
        parts.append(_sizes([figures.SizePoint(**record) for record in found["minilm"]]))
    if "efficientnet" in found:
        parts.append(_photos([figures.PhotoPoint(**record) for record in found["efficientnet"]]))
    for approach, fit in found.get("fit", {}).items():
        parts.append(
            f"`fit` of MiniLM without evaluations, {approach}, `max_size` {fit['asked'] / 1e6:g} MB: "
            f"{fit['seconds']:.1f} s, peak {fit['peak'] / 1e9:.2f} GB ({fit['peak_before'] / 1e9:.2f} GB of it before)."
        )
    return "\n\n".join(parts)


def _sizes(points: Sequence[figures.SizePoint]) -> str:
    rows = [
        (
            *(p.approach, f"{p.nbytes / 1e6:.3f}", f"{p.nbytes / p.planned - 1:+.2%}", f"{p.lee:.5f}"),
            *(f"{p.wikipedia:.5f}", f"{p.wikipedia / p.lee:.2f}"),
        )
        for p in points
    ]
    columns = ("MiniLM", "file MB", "beyond plan", "1 - cos, Lee", "1 - cos, Wikipedia", "Wikipedia / Lee")
    return markdown(columns, rows)


def _photos(points: Sequence[figures.PhotoPoint]) -> str:
    rows = [
        (
            *(f"{p.nbytes / 1e6:.3f}", f"{p.ratio:.4f}", f"{p.nbytes / p.planned - 1:+.2%}", f"{p.damage:.2e}"),
            *(f"{p.kl:.4f}", f"{p.agreement:.3f}"),
        )
        for p in points
    ]
    columns = ("EfficientNet-Lite0, file MB", "of FP32", "beyond plan", "damage", "KL, unseen photos", "agreement")
    return markdown(columns, rows)


def every_layer(found: Mapping[str, Any]) -> str:
    layer = [
        (
            *(f"{r.layer}, batch {r.batch}", f"{r.float32:.1f}", f"{r.bfloat16:.1f}", f"{r.ours:.1f}"),
            *(f"**{r.ours / r.float32:.2f}**", r.kernel, f"{-10 * math.log10(r.lost):.1f} dB"),
        )
        for r in (layers.Recurrent(**record) for record in found["recurrent"])
    ]
    columns = ("2 layers, both ways, 100 steps", "float32 ms", "bfloat16 ms", "ours ms", "ours / float32")
    models = [*_dual_path(found["dual_path"]), *_small_memory(found["memory"])]
    return f"{markdown((*columns, 'runs', 'SNR'), layer)}\n\n{markdown(('model', 'measured'), models)}"


def _dual_path(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    ms = {name: each["median"] for name, each in found["times"].items()}
    least = layers.LEAST_SNR
    shares = {name: f"{each / ms['float32']:.2f} ({each:.0f} ms / {ms['float32']:.0f} ms)" for name, each in ms.items()}
    smallest = f"{found['smallest_bytes'] / found['float_bytes']:.3f} ({found['smallest_bytes'] / 1e6:.2f} MB)"
    return [
        ("dual-path RNN at 8 bits: time, ours / float32", shares["ours"]),
        ("dual-path RNN in bfloat16: time / float32", shares["bfloat16"]),
        ("dual-path RNN at 8 bits: SNR", f"{found['snr']:.1f} dB"),
        (f"dual-path RNN searched down to {least:g} dB: file / FP32", smallest),
        ("its SNR", f"{found['smallest_snr']:.1f} dB, {found['evaluations']} evaluations"),
        ("its SNR on an input that the search did not see", f"{found['unseen_snr']:.1f} dB"),
    ]


def _small_memory(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    def share(held: Mapping[str, int]) -> str:
        return f"{held['small'] / held['float32']:.2f} ({held['small'] / 1e6:.0f} MB / {held['float32'] / 1e6:.0f} MB)"

    rows = [
        ('MiniLM with `memory="small"`: resident / float32', share(found["resident"])),
        ("the same without pages of files, which PyTorch's libraries have", share(found["own"])),
    ]
    for shape, key in (("8 x 128", "speed_8x128"), ("1 x 32", "speed_1x32")):
        ms = {name: each["median"] for name, each in found[key].items()}
        rows.append((f"its time for {shape} tokens", f"{ms['small']:.1f} ms / {ms['float32']:.1f} ms"))
    return rows


def checkpoints(found: Mapping[str, Any]) -> str:
    big, small = found["large"], found["minilm"]
    rows = []
    for bits, done in big["compress"].items():
        speed = f"**{big['source'] / 1e6 / done['seconds']:.0f}** ({done['cpu_seconds']:.1f} s of processor)"
        rows += [
            (f"{bits} bits: MB of FP32 a second", speed),
            (f"{bits} bits: file / FP32", f"{done['nbytes'] / big['source']:.4f}"),
            (f"{bits} bits: predicted / file", f"{big['predicted'][bits] / done['nbytes']:.4f}"),
            (f"{bits} bits: peak memory", f"{done['peak'] / 1e9:.2f} GB"),
        ]
    back = big["expand"]
    rows.append(("expand: MB of FP32 a second", f"{big['source'] / 1e6 / back['seconds']:.0f}"))
    rows.append(("expand: peak memory", f"{back['peak'] / 1e9:.2f} GB"))
    sizes = [
        (name, f"{row['nbytes'] / 1e6:.3f}", f"{row['nbytes'] / small['float_bytes']:.4f}", f"{row['distance']:.5f}")
        for name, row in small["rows"].items()
    ]
    head = f"checkpoint of {big['source'] / 1e9:.2f} GB"
    return (
        f"{markdown((head, 'measured'), rows)}\n\n"
        f"{markdown(('MiniLM without data', 'file MB', 'of FP32', '1 - cos, Lee'), sizes)}"
    )


def gate(found: Mapping[str, Any]) -> str:
    rows = []
    for name, record in found.items():
        v = damage.Verdict.of([damage.Pair(**pair) for pair in record["pairs"]])
        numbers = (f"{v.rank:.3f}", f"{v.factor:.2f}", f"{v.slope:.2f}", f"x {v.spread:.2f}")
        rows.append((name, str(v.pairs), *numbers, "passed" if v.passed else "**failed**"))
    columns = ("what", "pairs", "Spearman", "measured / predicted", "log-log slope", "spread", "gate")
    return f"{markdown(columns, rows)}\n\n![measured against predicted damage](../damage.svg)"


def refinements(found: Mapping[str, Any]) -> str:
    rows = []
    for r in (ablation.Row(**record) for record in found.values()):
        shares = ", ".join(f"{loss} {share:+.1%}" for loss, share in r.saved.items())
        rows.append((r.what, r.subject, shares, f"{r.seconds:+.0f}", "kept" if r.kept else "rejected", r.note))
    return markdown(("refinement", "model", "bytes saved at equal loss", "CPU s", "", "note"), rows)


def in_a_browser(found: Mapping[str, Any]) -> str:
    rows = [
        ("the page", f"{found['bytes'] / 1e6:.2f} MB"),
        ("first paint", f"{found['first_paint_ms']:.0f} ms"),
        ("interactive", f"{found['interactive_ms']:.0f} ms"),
        ("of that, work of the page's own thread", f"{found['work_ms']:.0f} ms"),
        ("sorting the table, layout included", f"{found['sort_ms']:.0f} ms"),
        ("writing the page, model to file", f"{found['report_seconds']:.1f} s"),
    ]
    return markdown((f"report of {found['layers']:,} layers", "measured"), rows)


SECTIONS: dict[str, tuple[Path, Callable[[Mapping[str, Any]], str]]] = {
    "make bench": (run.RESULTS, job_and_machine),
    "make bench-figures": (figures.RESULTS, at_sizes),
    "make bench-search": (search.RESULTS, searches),
    "make bench-layers": (layers.RESULTS, every_layer),
    "make bench-page": (page.RESULTS, in_a_browser),
    "make bench-compress": (compress.RESULTS, checkpoints),
    "make bench-damage": (damage.RESULTS, gate),
    "make bench-ablation": (ablation.RESULTS, refinements),
    "make bench-peers": (peers.RESULTS, tables.whole),
    "make bench-graphs": (graphs.RESULTS, graphs.table),
    "make bench-scaling": (scaling.RESULTS, scaling_report.whole),
    "make bench-tensors": (tensors.RESULTS, tensors.table),
    "make bench-architectures": (architectures.RESULTS, table.whole),
}


PLOTS: dict[str, Callable[[Mapping[str, Any]], None]] = {
    "make bench-scaling": scaling_report.draw,
}


def fill(file: Path, command: str, content: str) -> None:
    """Put something between a command's marks."""
    text = file.read_text(encoding="utf-8")
    pattern = re.compile(MARKS.format(re.escape(command)), re.DOTALL)
    assert pattern.search(text), f"{file} has no place for {command}"
    file.write_text(pattern.sub(lambda m: f"{m[1]}{content}\n{m[2]}", text), encoding="utf-8")


def main() -> None:
    for command, (path, section) in SECTIONS.items():
        if not path.is_file():
            print(f"not run yet: {command}")
            continue
        found = json.loads(path.read_text(encoding="utf-8"))
        fill(PAGES.get(command, MORE), command, section(found))
        if command in PLOTS:
            PLOTS[command](found)
        print(f"written: {command}")
    front.draw()


if __name__ == "__main__":
    main()
