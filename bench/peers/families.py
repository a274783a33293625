"""Which peers there are, in the order of the tables; ours come last, since one has to be as small as any."""

from __future__ import annotations

from dataclasses import dataclass

from bench.peers import environments


@dataclass(frozen=True)
class Family:
    """Args:
    module: of `bench.peers.workers`.
    environment: one of `environments`.
    peers: the keys of the module's `PEERS`.
    """

    module: str
    environment: str
    peers: tuple[str, ...]


BASELINE = "fp32"
FLOORS = (BASELINE, "bf16")  # in every table
OURS = ("pared", "pared-small")
FAMILIES: dict[str, Family] = {
    "eager": Family("eager", environments.OWN, FLOORS),
    "torch_ao": Family("torch_ao", environments.OWN, ("torch-dynamic",)),
    "torchao": Family("torchao", "torch", ("torchao-dynamic", "torchao-weight")),
    "quanto": Family("quanto", "torch", ("quanto-w8", "quanto-w4")),
    "ort": Family("ort", "ort", ("ort-fp32", "ort-dynamic", "ort-static")),
    "openvino": Family("openvino", "openvino", ("openvino-bf16", "openvino-w8", "openvino-w4", "openvino-int8")),
    "inc2": Family("inc2", "inc2", ("inc2-static", "inc2-static-nobf16", "inc2-dynamic")),
    "inc3": Family("inc3", "inc3", ("inc3-static", "inc3-rtn4")),
    "ours": Family("ours", environments.OWN, OURS),
}
