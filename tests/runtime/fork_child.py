"""Run by test_forks.py in a fresh process: loads a model, forks, and calls it in the child; prints how that ended."""

import os
import sys
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import pared

DEADLINE = 60.0  # seconds for a call that takes milliseconds
IDS = (8, 12)


class Encoder(nn.Module):
    """Large enough that decoding its weights, and a call, are shared out among threads."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(1000, 128)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(128, 4, 512, batch_first=True) for _ in range(2))
        self.head = nn.Linear(128, 1000)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.head(x)
        return out


def load(directory: str, memory: str, warm: bool = True) -> nn.Module:
    with torch.device("meta"):  # else making it would start threads, and no child could call anything
        skeleton = Encoder()
    return pared.load(directory, model=skeleton, memory="small" if memory == "small" else "fast", warm=warm)


def in_a_thread(directory: str) -> nn.Module:
    found: list[nn.Module] = []
    thread = threading.Thread(target=lambda: found.append(load(directory, "fast")))
    thread.start()
    thread.join()
    return found[0]


WAYS: dict[str, Callable[[str], nn.Module]] = {
    "fast": lambda directory: load(directory, "fast"),
    "small": lambda directory: load(directory, "small"),
    "cold": lambda directory: load(directory, "fast", warm=False),
    "other threads": lambda directory: load(directory, "fast"),
    "in a thread": in_a_thread,
    "pickled": lambda directory: torch.load(f"{directory}/model.pt", weights_only=False),
}


def main(way: str, directory: str) -> str:
    torch.set_num_threads(2)
    model = WAYS[way](directory)
    child = os.fork()
    if not child:
        if way == "other threads":
            torch.set_num_threads(1)
        with torch.no_grad():
            model(torch.zeros(IDS, dtype=torch.long))
        sys.exit(0)  # as servers' workers end: whatever is freed then must not wait for threads that are gone
    begin = time.monotonic()
    while time.monotonic() - begin < DEADLINE:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return "answers" if status == 0 else f"ends with {status}"
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return "hangs"


if __name__ == "__main__":
    print(main(*sys.argv[1:]))  # noqa: T201  # that is the answer
