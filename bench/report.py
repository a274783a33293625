"""`make docs`: put the figures of the last `make bench` into `docs/results.md` and into the README's table."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.run import RESULTS, THREADS

MARKS = re.compile(r"(<!-- results: make bench -->\n).*?(<!-- end of results -->)", re.DOTALL)


def table(found: Mapping[str, Any]) -> str:
    m, d, e = found["minilm"], found["dual_path"], found["effnet"]
    fast, small = m["speed_8x128"], m["speed_1x32"]
    size = d["float_bytes"]

    def ratio(a: Mapping[str, float], b: Mapping[str, float]) -> str:
        return f"{a['median'] / b['median']:.2f} ({a['median']:.1f} ms / {b['median']:.1f} ms)"

    loading, memory = m["loading"], m["memory"]
    sizes = f"{m['weight_only_bytes'] / 1e6:.2f} MB of {m['float_bytes'] / 1e6:.1f}"
    photos = f"{e['bytes'] / e['float_bytes']:.3f} of {e['float_bytes'] / 1e6:.1f} MB"
    kl = f"{e['kl_weight_only']:.4f} / {e['kl_int8']:.4f} nat"
    rows = [
        ("MiniLM at 8 bits, `best_model.pt`", sizes, "<= 21.2 MB"),
        ("mean 1 - cosine on the Lee documents, weight-only", f"{m['distance_weight_only']:.5f}", "<= 0.0009"),
        ("the same with int8 kernels", f"{m['distance_int8']:.5f}", "<= 0.006"),
        ("8 x 128 tokens, int8 / float32", ratio(fast["pared"], fast["float32"]), "<= 0.25"),
        ("8 x 128 tokens, bfloat16 / float32", ratio(fast["bfloat16"], fast["float32"]), "(beside it)"),
        ("1 x 32 tokens, int8 / float32", ratio(small["pared"], small["float32"]), "<= 1"),
        ("1 x 32 tokens, int8 / bfloat16", ratio(small["pared"], small["bfloat16"]), "<= 1"),
        ("load: ours / torch.load + load_state_dict", ratio(loading["pared"], loading["torch"]), "<= 1.5"),
        ("resident memory, weight-only / float32", f"{memory['weight_only'] / memory['float']:.2f}", "<= 1.05"),
        ("resident memory, int8 / float32", f"{memory['int8'] / memory['float']:.2f}", "<= 0.6"),
        ("`import pared`, all names, beyond torch", f"{m['import_seconds']:.2f} s", "<= 0.3 s"),
        ("`fit` at 8 bits on MiniLM, 100 documents", f"{m['fit_seconds']:.1f} s", "<= 5 s"),
        ("dual-path RNN, `best_model.pt`", f"{d['artifact_bytes'] / size:.3f} of {size / 1e6:.1f} MB", "<= 0.256"),
        ("dual-path RNN, `torch.save(model)`", f"{d['object_bytes'] / size:.3f}", "<= 0.256"),
        ("dual-path RNN, `torch.save(model.state_dict())`", f"{d['state_bytes'] / size:.3f}", "<= 0.256"),
        ("dual-path RNN, output SNR", f"{d['snr']:.1f} dB", ">= 33 dB"),
        ("EfficientNet-Lite0 at 8 bits, `best_model.pt`", photos, ""),
        ("its KL to FP32 on unseen photos, weight-only / int8", kl, ""),
        ("its time for one photo, ours / float32", ratio(e["speed"]["pared"], e["speed"]["float32"]), ""),
    ]  # fmt: skip
    lines = [
        "| what | measured | asked for |",
        "|---|---|---|",
        *(f"| {a} | {b} | {c} |" for a, b, c in rows),
    ]
    return "\n".join(lines)


def report(found: Mapping[str, Any]) -> str:
    machine = found["machine"]
    return (
        "# Results\n\nWritten by `make bench`; do not edit. Medians of interleaved runs in one process, "
        f"{THREADS} threads.\n\n{table(found)}\n\nMachine: {machine['processor']}, {machine['capability']}, "
        f"torch {machine['torch']}, Python {machine['python']}. Kernels of MiniLM's tensors: "
        f"{', '.join(f'{v} {k}' for k, v in found['minilm']['kernels'].items())}.\n"
    )


def main() -> None:
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    Path("docs/results.md").write_text(report(found), encoding="utf-8")
    readme = Path("README.md")
    text = readme.read_text(encoding="utf-8")
    readme.write_text(MARKS.sub(lambda m: f"{m[1]}{table(found)}\n{m[2]}", text), encoding="utf-8")
    print("written: docs/results.md, and the table in README.md")


if __name__ == "__main__":
    main()
