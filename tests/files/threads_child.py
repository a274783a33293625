"""Run by test_threads.py in a fresh process, where no kernel has started threads yet; prints JSON."""

import json
import sys

import psutil
import torch
from torch import nn

import pared
from pared import PostTrainingQuantConfig

LARGE = 512  # so much work that kernels share it out
THREADS = "threads of the process: before, with 1, with 2"


def threads() -> int:
    return psutil.Process().num_threads()


def kernels() -> dict[str, list[int]]:
    """How many threads there are after calls with one thread allowed, and then with two."""
    cases = [
        ("linear", "static"),
        ("linear", "dynamic"),
        ("conv2d", "static"),
        ("conv2d", "dynamic"),
        ("lstm", "dynamic"),
    ]
    torch.set_num_threads(1)
    from tests.runtime.counterparts import build  # only now: it calls torch, which would start threads

    counts = [threads()]
    made = [(build(name, mode), LARGE if name == "linear" else 1) for name, mode in cases]
    for allowed in (1, 2):
        torch.set_num_threads(allowed)
        for (_, counterpart, args, _), times in made:
            counterpart(args[0].repeat(times, *[1] * (args[0].dim() - 1)))
        counts.append(threads())
    return {THREADS: counts}


def everything() -> dict[str, list[int]]:
    """What is allowed after each step of a life, of which it began with one."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    x = torch.randn(16, 32)
    allowed = [(torch.get_num_threads(), torch.get_num_interop_threads())]
    q = pared.fit(model, PostTrainingQuantConfig(max_size="6kB"), [x], quiet=True)
    allowed.append((torch.get_num_threads(), torch.get_num_interop_threads()))
    pared.save(q, sys.argv[2])
    loaded = pared.load(sys.argv[2], model=model)
    allowed.append((torch.get_num_threads(), torch.get_num_interop_threads()))
    loaded(x)
    allowed.append((torch.get_num_threads(), torch.get_num_interop_threads()))
    return {"allowed": [each for each, _ in allowed], "between operations": [each for _, each in allowed]}


if __name__ == "__main__":
    with torch.inference_mode():
        print(json.dumps({"kernels": kernels, "everything": everything}[sys.argv[1]]()))  # noqa: T201  # that is the answer
