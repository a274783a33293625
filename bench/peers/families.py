"""Which peers there are, in the order of the tables; ours come last, since one has to be as small as any."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.peers import environments


@dataclass(frozen=True)
class Family:
    """Args:
    module: the module in `bench.peers.workers`.
    environment: one of `environments`.
    peers: the keys of the module's `PEERS`.
    only: the subjects that it is for; empty: all.
    """

    module: str
    environment: str
    peers: tuple[str, ...]
    only: tuple[str, ...] = ()


BASELINE = "fp32"
FLOORS = (BASELINE, "bf16")  # in every table
CHOSEN = "pared"  # in the form that `fit` chose
FORMS = {"pared-layers": "layer by layer", "pared-graph": "as a graph", "pared-openvino": "in OpenVINO"}
OURS = (CHOSEN, *FORMS, "pared-small")
NNCF, STATIC, LLAMA = "openvino-int8", "ort-static", "llamacpp-q8"
FAMILIES: dict[str, Family] = {
    "eager": Family("eager", environments.OWN, FLOORS),
    "torch_ao": Family("torch_ao", environments.OWN, ("torch-dynamic",)),
    "torchao": Family("torchao", "torch", ("torchao-dynamic", "torchao-weight")),
    "quanto": Family("quanto", "torch", ("quanto-w8", "quanto-w4")),
    "ort": Family("ort", "ort", ("ort-fp32", "ort-dynamic", STATIC)),
    "openvino": Family("openvino", "openvino", ("openvino-bf16", "openvino-w8", "openvino-w4", NNCF)),
    "llamacpp": Family("llamacpp", "llamacpp", (LLAMA,), only=("smollm2",)),
    "inc2": Family("inc2", "inc2", ("inc2-static", "inc2-static-nobf16", "inc2-dynamic")),
    "inc3": Family("inc3", "inc3", ("inc3-static", "inc3-rtn4")),
    "ours": Family("ours", environments.OWN, OURS),
}
# What is measured if nothing is named: the tools that people would choose for each of the models today, and ours.
USUAL = (*FLOORS, STATIC, NNCF, LLAMA, CHOSEN, *FORMS)
USUAL_BESIDES: dict[str, tuple[str, ...]] = {
    "textgenrnn": ("ort-fp32", "ort-dynamic"),
    "smollm2": ("openvino-w8",),
}
ALL = "all"


def wanted(names: Sequence[str], subject: str) -> Iterator[tuple[Family, str]]:
    """Peers and their families, the floors always among them.

    Args:
        names: families or single peers, or `ALL`; empty: the usual ones.
        subject: the model that they are for.
    """
    asked = names or (*USUAL, *USUAL_BESIDES.get(subject, ()))
    for key, family in FAMILIES.items():
        if family.only and subject not in family.only:
            continue
        for peer in family.peers:
            if {ALL, key, peer} & set(asked) or peer in FLOORS:
                yield family, peer
