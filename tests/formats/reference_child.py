"""Started by test_exactness.py where PyTorch may use no vector unit, as on ARM: compresses, saves and loads a model."""

import json
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import pared
from pared import PostTrainingQuantConfig


def main() -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({"lstm": nn.LSTM(16, 16), "norm": nn.LayerNorm(16), "head": nn.Linear(16, 8)})
    model = nn.Sequential(nn.Linear(16, 16), net["norm"], net["head"]).eval()
    x = torch.randn(8, 16)
    q = pared.fit(model, PostTrainingQuantConfig(quant_level=0, approach="dynamic"), [x])
    with tempfile.TemporaryDirectory() as directory:
        pared.save(q, Path(directory))
        loaded = pared.load(Path(directory), model)
    q2 = pared.fit(net["lstm"], PostTrainingQuantConfig(quant_level=0, approach="dynamic"), [x])
    with torch.no_grad():
        report = {
            "capability": torch.backends.cpu.get_cpu_capability(),
            "kernels": sorted({line.kernel for one in (q, q2) for line in one.plan}),
            "report": q.report(),
            "equal": torch.equal(q(x), loaded(x)),
            "error": float((q(x) - model(x)).norm() / model(x).norm()),
        }
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main()
