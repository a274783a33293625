"""Where the time of MiniLM's graph goes, and what share of the machine's int8 peak its products reach.

Every operator is timed at its place in the graph, as the best of many calls; the peak is a product of large matrices
in the same process (`make bench-graphs`).
"""

import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from examples import minilm
from torch import Tensor, fx

import pared
from bench.markdown import markdown
from bench.run import OUT, THREADS
from pared import PostTrainingQuantConfig
from pared.runtime.float_forms import outline_of
from pared.runtime.graphs.call_kinds import arguments_of, bind, parameters_of
from pared.runtime.graphs.capturing.capture import capture
from pared.runtime.graphs.graph import Graph
from pared.runtime.graphs.merging import product_and_sum
from pared.runtime.graphs.products import QLINEAR, joined, quantize_contiguous_all
from pared.runtime.kernels import linear
from pared.runtime.kernels.linear import product_of_rows

RESULTS = OUT / "graphs.json"
_LARGE, _ROUNDS, _BATCH, _TOKENS = 2048, 15, 8, 128


class _Timed(fx.Interpreter):
    """Remembers the shortest time of each operator, and the multiplications of products."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.best: dict[fx.Node, float] = defaultdict(lambda: float("inf"))
        self.work: dict[fx.Node, int] = {}
        self.columns: dict[Any, int] = {}  # of codes that are filled up with what meets zeros

    def run_node(self, n: fx.Node) -> Any:
        start = time.perf_counter()
        result = super().run_node(n)
        self.best[n] = min(self.best[n], time.perf_counter() - start)
        given = self.fetch_args_kwargs_from_env(n)[0]
        if n.target in (quantize_contiguous_all, joined):
            self.columns[n] = given[0].shape[-1] + len(given[-2].columns)
        if n.target in (QLINEAR, product_and_sum, product_of_rows):
            codes: Tensor = given[0].codes if isinstance(given[0], linear.Rows) else given[0]
            columns = self.columns.get(n.args[0], codes.shape[-1])
            self.work[n] = codes.numel() // codes.shape[-1] * columns * result.shape[-1]
        return result


def peak() -> float:
    """int8 multiplications and additions a second of a large product."""
    codes = torch.randint(-127, 128, (_LARGE, _LARGE), dtype=torch.int8)
    packed = linear.pack(codes, torch.ones(_LARGE))
    x = torch.randint(0, 256, (_LARGE, _LARGE), dtype=torch.uint8)
    arguments = (x, 1.0, 0, packed.weight, packed.step, packed.zeros, None, 1.0, 0, torch.float32, "none", [], "")
    seconds = _best(lambda: QLINEAR(*arguments))
    return float(2 * _LARGE**3 / seconds)


def _best(run: Callable[[], object]) -> float:
    found = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found)


def measured(approach: str) -> dict[str, Any]:
    """One way of treating inputs: milliseconds by operator, and the share of the peak."""
    conf = PostTrainingQuantConfig(approach=approach, quant_level=0)  # type: ignore[arg-type]  # one of its choices
    model = minilm.load()
    small = pared.fit(model, conf, minilm.calibration(), quiet=True)
    inputs = minilm.tokenize(sorted(minilm.unseen(100), key=len)[-_BATCH:], _TOKENS)
    bound = bind(parameters_of(small), (), inputs)
    assert bound is not None
    graph = Graph(small, capture(outline_of(small), arguments_of(bound)))
    timed = _Timed(graph.module)
    with torch.inference_mode():
        for _ in range(_ROUNDS):
            timed.run(*(value for value in bound.values() if isinstance(value, Tensor)))
        whole, floats = _best(lambda: graph(bound)), _best(lambda: model(**inputs))
        most = peak()
    by_kind: dict[str, float] = defaultdict(float)
    for node, seconds in timed.best.items():
        kind = getattr(node.target, "__name__", str(node.target)) if node.op == "call_function" else "the rest"
        by_kind[kind.removesuffix(".default")] += 1e3 * seconds
    work, seconds = 2 * sum(timed.work.values()), sum(timed.best[node] for node in timed.work)
    texts = minilm.documents()
    return {
        "graph_ms": 1e3 * whole,
        "float32_ms": 1e3 * floats,
        "operators_ms": dict(sorted(by_kind.items(), key=lambda one: -one[1])),
        "peak": most,
        "products": work / seconds,
        "least_ms": 1e3 * work / most,
        "distance": minilm.distance(minilm.embed(small, texts), minilm.embed(model, texts)),
    }


def table(found: Mapping[str, Any]) -> str:
    """The figures as Markdown."""
    rows = [
        (
            *(name, f"{one['distance']:.4f}", f"{one['graph_ms']:.1f}", f"{one['graph_ms'] / one['float32_ms']:.2f}"),
            *(f"{one['least_ms']:.1f} ({one['least_ms'] / one['float32_ms']:.2f})",),
            f"{one['products'] / one['peak']:.0%} of {one['peak'] / 1e12:.2f} T/s",
            ", ".join(f"{kind} {ms:.1f}" for kind, ms in list(one["operators_ms"].items())[:8]),
        )
        for name, one in found.items()
    ]
    columns = (
        "inputs",
        "1 - cos",
        "ms",
        "of FP32",
        "products at the peak, ms (of FP32)",
        "share of int8 peak",
        "ms by operator",
    )
    return markdown(columns, rows)


def main() -> None:
    torch.set_num_threads(THREADS)
    found = {approach: measured(approach) for approach in ("auto", "static")}
    OUT.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
