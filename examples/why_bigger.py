"""Why a quantized model can be larger than the float one: the files that Intel Neural Compressor 2.6 writes.

They are written by plain torch, with the same tensors under the same names, and `pared` says what is wrong with each.

    python -m examples.why_bigger [FOLDER]

writes them for the dual-path RNN of 131.5 MB and for a small network, and prints the tables of
docs/why-is-my-model-bigger.md.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

import pared
from examples import dual_path
from pared.errors import ConfigError
from pared.inspection.findings import Finding

_CONVOLUTIONS: Final = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)  # whose weights INC 2.6 makes int8, as Linear's


def plain(model: nn.Module) -> dict[str, Any]:
    """What `torch.save(model.state_dict())` writes of the float model."""
    return dict(model.state_dict())


def quantized(model: nn.Module) -> dict[str, Any]:
    """The state of the quantized half: int8 for Linear and convolutions; LSTM, norms and the rest as they were."""
    state: dict[str, Any] = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            packed = f"{name}._packed_params"
            state[f"{name}.scale"], state[f"{name}.zero_point"] = torch.tensor(0.01), torch.tensor(64)
            state[f"{packed}.dtype"] = torch.qint8
            state[f"{packed}._packed_params"] = (_int8(module.weight.detach()), state.pop(f"{name}.bias"))
            del state[f"{name}.weight"]
        elif isinstance(module, _CONVOLUTIONS):
            state[f"{name}.weight"] = _int8(module.weight.detach())
            state[f"{name}.scale"], state[f"{name}.zero_point"] = torch.tensor(0.01), torch.tensor(64)
    return state


def own_save(model: nn.Module) -> dict[str, Any]:
    """What `q_model.save(folder)` writes to best_model.pt after static quantization."""
    weight = {"dtype": "int8", "scheme": "sym", "algorithm": "minmax", "granularity": "per_channel"}
    ops = {(name, type(m).__name__): {"weight": weight} for name, m in model.named_modules() if _is_quantized(m)}
    return {**quantized(model), "best_configure": {"op": ops, "approach": "post_training_static_quant"}}


def wrapped(model: nn.Module) -> dict[str, Any]:
    """What `torch.save(q_model.state_dict())` writes: the object keeps the float model as a child, `fp32_model`."""
    tuned = {f"_model.{name}": _copied(value) for name, value in quantized(model).items()}
    return {**tuned, **{f"fp32_model.{name}": value for name, value in model.state_dict().items()}}


def weight_only(model: nn.Module) -> dict[str, Any]:
    """What `q_model.save(folder)` writes after weight-only quantization: four-bit values, one per float32."""
    state: dict[str, Any] = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.in_features % 32 == 0:
            groups = module.weight.detach().reshape(-1, 32)
            step = groups.abs().amax(1, keepdim=True) / 7
            state[f"{name}.weight"] = (torch.round(groups / step).clamp(-8, 7) * step).reshape(module.weight.shape)
    return state


# What each row of the table is called, and what the file holds.
FILES: Final[Mapping[str, tuple[str, Callable[[nn.Module], dict[str, Any]]]]] = {
    "float.pt": ("the float model", plain),
    "wrapped.pt": ("INC static, `torch.save(q_model.state_dict())`", wrapped),
    "own_save.pt": ("INC static, `q_model.save(...)`", own_save),
    "weight_only.pt": ("INC weight-only, `q_model.save(...)`", weight_only),
}


@dataclass(frozen=True)
class Row:
    """A file, why it is so large, and what `pared compress` makes of it.

    Args:
        title: what it is.
        nbytes: the size of the file.
        findings: what `pared inspect` finds.
        after: the bytes of the compressed file; None where only the file that it was made from can be compressed.
    """

    title: str
    nbytes: int
    findings: tuple[Finding, ...]
    after: int | None


def save(state: object, path: Path) -> None:
    """`torch.save`, of quantized tensors too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch announces that it will drop them
        torch.save(state, path)


def write(model: nn.Module, folder: Path) -> dict[str, Path]:
    """The files, by name."""
    for name, (_, state) in FILES.items():
        save(state(model), folder / name)
    return {name: folder / name for name in FILES}


def measure(model: nn.Module, folder: Path) -> list[Row]:
    """Write the files into a folder, look into each, compress each."""
    rows = []
    for name, path in write(model, folder).items():
        ledger = pared.inspect(path)
        rows.append(Row(FILES[name][0], ledger.nbytes, ledger.findings, _compressed(path)))
    return rows


def _compressed(path: Path) -> int | None:
    try:
        return pared.compress(path, path.parent / f"small_{path.stem}").stat().st_size
    except ConfigError:  # it holds int8 instead of the weights: those are in the float file
        return None


def causes(findings: Sequence[Finding]) -> str:
    """The kinds that were found, with their bytes."""
    return "<br>".join(f"`{f.kind}`: {f.nbytes / 1e6:.1f} MB" for f in findings) or "nothing"


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    lines = [
        "| file | MB | / float | what `pared inspect` finds | after `pared compress`, MB |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = row.nbytes / rows[0].nbytes
        after = "compress the float file" if row.after is None else f"{row.after / 1e6:.1f}"
        lines.append(f"| {row.title} | {row.nbytes / 1e6:.1f} | {ratio:.2f} | {causes(row.findings)} | {after} |")
    return "\n".join(lines)


def _is_quantized(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, *_CONVOLUTIONS))


def _int8(weight: Tensor) -> Tensor:
    """Symmetric, with a scale for each output channel (of a transposed convolution: of dimension 0, as others)."""
    scale = weight.abs().flatten(1).amax(1).double() / 127
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # as above
        return torch.quantize_per_channel(weight, scale, torch.zeros(len(scale), dtype=torch.int64), 0, torch.qint8)


def _copied(value: object) -> object:
    """INC tunes a deep copy of the model, so that nothing is shared with the original."""
    return value.clone() if isinstance(value, Tensor) else value


def linear() -> nn.Module:
    """A model with nothing but layers that INC quantizes, 12.6 MB."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024))


# The tables of the document, by their headings.
MODELS: Final[Mapping[str, Callable[[], nn.Module]]] = {
    "Recurrent: LSTMs hold 96 % of the weights": dual_path.load,
    "Linear layers alone": linear,
}


def main() -> None:
    """Print the tables."""
    with tempfile.TemporaryDirectory() as temporary:
        for number, (title, load) in enumerate(MODELS.items()):
            folder = Path(sys.argv[1] if len(sys.argv) > 1 else temporary) / str(number)
            folder.mkdir(parents=True, exist_ok=True)
            print(f"### {title}\n\n{table(measure(load(), folder))}\n")


if __name__ == "__main__":
    main()
