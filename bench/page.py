"""`make bench-page`: the report of a model of 1,000 layers: its bytes, and when a browser is ready, as JSON.

Interactive is the first moment after the first frame is painted at which the browser has nothing else to do: its
script has run, and it answers. Medians over new browsers.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import torch
from tests.inspection import browser
from torch import nn

import pared
from bench import run

RESULTS = run.OUT / "page.json"
LAYERS: Final = 1000
_WIDTH: Final = 64
_BROWSERS: Final = 5
_WATCH: Final = """
addEventListener("load", () => requestAnimationFrame(() => setTimeout(() => {
  window.interactive = performance.now();
})));
"""
_SORT: Final = """
const began = performance.now();
document.querySelector("#rows thead th:nth-child(6) button").click();
document.body.offsetHeight;
return performance.now() - began;
"""


class Block(nn.Module):
    """Ten layers, around which the input passes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(_WIDTH, _WIDTH) for _ in range(10)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        passed: torch.Tensor = x + self.layers(x)
        return passed


def report(path: Path) -> float:
    """Write the report of a fitted model; the seconds that this took."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(LAYERS // 10)))
    conf = pared.PostTrainingQuantConfig(approach="static", quant_level=0)
    fitted: Any = pared.fit(model, conf, [torch.randn(8, _WIDTH)])
    began = time.perf_counter()
    fitted.report(html=path)
    return time.perf_counter() - began


def measure(path: Path) -> dict[str, float]:
    """Milliseconds in a new browser."""
    with tempfile.TemporaryDirectory() as profile:
        driver = browser.start(Path(profile))
        try:
            driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
            driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": _WATCH})
            driver.get(path.resolve().as_uri())
            time.sleep(1)
            metrics = driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
            work = next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")
            interactive = driver.execute_script("return window.interactive")
            paint = "return performance.getEntriesByName('first-contentful-paint')[0].startTime"
            return {
                "first_paint_ms": driver.execute_script(paint),
                "interactive_ms": interactive,
                "work_ms": 1000 * work,
                "sort_ms": driver.execute_script(_SORT),
            }
        finally:
            driver.quit()


def main() -> None:
    path = run.OUT / "page.html"
    seconds = report(path)
    times = [measure(path) for _ in range(_BROWSERS)]
    found = {
        "layers": LAYERS,
        "bytes": path.stat().st_size,
        "report_seconds": seconds,
        **{name: statistics.median(one[name] for one in times) for name in times[0]},
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
