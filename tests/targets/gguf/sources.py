"""Models as writers get them, with random numbers on the grids that a test asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pared.formats.groups.grid import Numbers
from pared.targets.pieces import Outline, Source
from pared.targets.target import Offer, Role, Target
from tests.targets.grids import random_parts

Choice = Callable[[str, tuple[Offer, ...]], Offer | None]


def finest(_: str, offers: tuple[Offer, ...]) -> Offer | None:
    return offers[0] if offers else None


def source_of(model: Any, target: Target, choose: Choice = finest, folder: Path | None = None) -> Source:
    """A model to be written; its own weights become what the chosen formats hold, so that it can be compared."""
    outlines: list[Outline] = []
    held: dict[str, Mapping[str, Numbers]] = {}
    tied: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        tied.setdefault(id(tensor), []).append(name)
    modules = dict(model.named_modules())
    for seed, (name, tensor) in enumerate(model.named_parameters()):
        module = modules[name.rpartition(".")[0]]
        role: Role = "other"
        if tensor.ndim == 2:
            head = module is model.get_output_embeddings()
            role = "table" if isinstance(module, nn.Embedding) else "head" if head else "linear"
        rows, columns = tensor.shape if tensor.ndim == 2 else (1, 1)
        if isinstance(module, Conv1D):
            rows, columns = columns, rows
        offer = choose(name, target.offers_for(role, columns)) if role != "other" else None
        if offer is not None and not isinstance(offer.grid, str):
            parts = random_parts(offer.grid, rows, columns, seed)
            values = torch.from_numpy(offer.grid.decode(parts))
            with torch.no_grad():
                tensor.copy_(values.T if isinstance(module, Conv1D) else values)
            held[name] = parts
        else:
            held[name] = {"values": tensor.detach().numpy()}
        names = tuple(tied[id(tensor)])
        outlines.append(Outline(name, tuple(tensor.shape), role, offer, "float32", names))
    config = model.config.to_dict()
    return Source(outlines, lambda outline: held[outline.name], config, folder, {"tool": "a test"})
