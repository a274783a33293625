"""Write the golden files of the format: `python -m tests.golden.make v5`. Released ones are never written again.

Both containers hold the same tensors, one of each way of storing them; `decoded.pt` holds what every tensor must decode
to, bit for bit. (Those of version 1 hold a small network.)
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pared.artifact.envelope import FILE_NAMES
from pared.formats.activation import Activation
from pared.formats.coded import Coded, Float, Grid, Grouped, Raw, log_step
from pared.formats.views import View, first_dimension, single_row, view_of
from pared.model import storage
from pared.model.contents import Contents, Decision, Stored
from pared.model.state.extra import ExtraState
from tests.formats.groups.grids import GRIDS, random_parts

FOLDER = Path(__file__).parent
RANDOM = torch.Generator()


def rows(view: View, shape: tuple[int, ...]) -> Tensor:
    """Gaussian rows of very different spreads."""
    matrix = torch.randn(view.n_rows, view.n_columns, generator=RANDOM)
    return view.restore(matrix * torch.randn(view.n_rows, 1, generator=RANDOM).exp(), shape)


def steps(view: View, step: float) -> Tensor:
    """About the same for all rows, but on no scale."""
    return step * (1 + torch.rand(view.row_sizes, generator=RANDOM) / 8)


def grids() -> dict[str, Coded]:
    """Grids in all their ways: codes coded, plain, constant, in 8 classes and in fewer; steps on a scale and off it."""
    table, octaves, wide, small, tiny = map(first_dimension, ((512, 40), (200, 40), (64, 64), (4, 6), (2, 3)))
    module = nn.ConvTranspose2d(16, 48, 3, groups=2, device="meta")
    transposed = view_of(module, "weight", (16, 24, 3, 3))
    some_zero = log_step(steps(table, 0.5) * torch.arange(1, 513) / 100)
    some_zero[::100] = 0
    signs = torch.randn(octaves.split, generator=RANDOM).sign()
    off = steps(small, 0.1)
    off[1] = 0
    return {
        "table": Grid("int8").encode(rows(table, (512, 40)), some_zero, table),
        "transposed": Grid("int8").encode(rows(transposed, (16, 24, 3, 3)), steps(transposed, 0.4), transposed),
        "wide": Grid("int16").encode(rows(wide, (64, 64)), log_step(steps(wide, 0.001)), wide),
        "wide, coarse": Grid("int16").encode(rows(wide, (64, 64)).bfloat16(), steps(wide, 0.5), wide),
        "one row": Grid("int8").encode(torch.randn(50, 2, generator=RANDOM), torch.tensor(0.125), single_row((50, 2))),
        "octaves": Grid("int16").encode(signs * 4.0 ** (torch.arange(200) % 8)[:, None], torch.ones(200), octaves),
        "tiny": Grid("int8").encode(torch.tensor([[1.0, 2, 3], [4, 5, 6]]), torch.tensor([1.0, 0.5]), tiny),
        "off": Grid("int8").encode(torch.randn(4, 6, generator=RANDOM).half(), off, small),
        "zero": Grid("int8").encode(torch.zeros(4, 6), torch.zeros(4), small),
        "empty": Grid("int8").encode(torch.zeros(0, 6), torch.zeros(0), first_dimension((0, 6))),
    }


def contents() -> Contents:
    """The same on every call."""
    RANDOM.manual_seed(2)
    vector = torch.randn(1100, generator=RANDOM)
    coded = grids() | {
        "half": Float("float16").encode(vector[:37]),
        "bfloat": Float("bfloat16").encode(vector[:5].double()),
        "single": Float("float32").encode(vector),
        "count": Raw("int64").encode(torch.tensor(7)),
        "mask": Raw("bool").encode(vector[:9] > 0),
        "spectrum": Raw("complex64").encode(torch.complex(vector[:3], vector[3:6])),
        "none": Raw("float32").encode(torch.zeros(0, 5)),
    }
    stored = []
    for name, value in coded.items():
        grid = isinstance(value.format, Grid)
        decision = Decision(name, "grid" if grid else "exact", 4.5 if grid else None, "" if grid else "for the files")
        names = (name, "tied") if name == "table" else (name,)
        stored.append(Stored(names, "parameter" if value.dtype.is_floating_point else "buffer", value, decision))
    modules = {"": Activation("dynamic"), "a": Activation("static", -1.0, 2.5)}
    return Contents(tuple(stored), modules, {"pared": "0.1.0", "about": "golden files"})


def contents_of_version_3() -> Contents:
    """What only version 3 has, beside a few tensors: extra state of every kind, and buffers that are left out."""
    first = contents()
    made = torch.arange(2000.0).reshape(20, 100)
    left = Stored(
        ("positions", "again"), "buffer", Raw("float32").encode(made), Decision("positions", "made", None, "")
    )
    tree = {
        "dict": [
            ["plain", [None, True, 3, 2.5, "text", {"float": "-inf"}, {"complex": [1.0, -2.0]}]],
            [{"tuple": [1, "key"]}, {"ordered": [["a", {"set": [1, 2]}], ["b", {"frozenset": []}]]}],
            ["torch", [{"dtype": "float16"}, {"device": "cpu"}, {"size": [2, 3]}]],
            ["numbers", [{"tensor": 0}, {"array": 1}, {"bytes": 2}, {"bytearray": 3}, {"stream": 4}]],
        ]
    }
    row = torch.arange(5, dtype=torch.uint8)
    tensors = (made[:2].bfloat16(), made[0].double(), row, row[:0], row + 250)
    states = {"a._extra_state": ExtraState(tree, tensors), "_extra_state": ExtraState(None)}
    return replace(first, tensors=(*first.tensors[-5:], left), states=states)


def contents_of_version_4() -> Contents:
    """Grids with groups of every kind, with views of every kind, beside a few tensors of older versions."""
    first = contents()
    views = [((64, 300), (0,)), ((70, 40), (1,)), ((3, 20, 64), (0, 1)), ((2, 8, 6), (0, 2)), ((0, 5), (0,))]
    stored = []
    for number, (name, grid) in enumerate(GRIDS.items()):
        shape, dimensions = views[number % len(views)]
        view, dtype = View(shape, dimensions), (torch.float32, torch.float16, torch.bfloat16)[number % 3]
        numbers = random_parts(grid, view.n_rows, view.n_columns, number)
        parts = {part: torch.from_numpy(value) for part, value in numbers.items()}
        if number % 2:  # any codes, which do not get smaller
            parts["codes"] = view.restore(parts["codes"], shape).contiguous()
            coded = Coded(Grouped(grid), shape, dtype, parts, view)
        else:
            step = 0.5 + torch.arange(parts["step"].numel()) % 8 / 16
            parts["step"] = step.reshape(parts["step"].shape)
            coded = Grouped(grid).encode(rows(view, shape).to(dtype), parts, view)
        stored.append(Stored((name,), "parameter", coded, Decision(name, "grid", float(grid.bits), "")))
    return replace(first, tensors=(*stored, *first.tensors[:2], *first.tensors[-3:]))


def contents_of_version_5() -> Contents:
    """Grids whose columns have scales, with views of every kind, beside a few tensors of older versions."""
    first = contents()
    views = [((40, 512), (0,)), ((70, 40), (1,)), ((3, 20, 64), (0, 1)), ((2, 8, 6), (0, 2)), ((0, 5), (0,))]
    stored = []
    for number, (shape, dimensions) in enumerate(views):
        view, dtype = View(shape, dimensions), (torch.float32, torch.float16, torch.bfloat16)[number % 3]
        fmt = Grid("int16" if number == 1 else "int8", scaled=True)
        scale = (torch.arange(view.n_columns) % 17 / 4 - 2).exp2().reshape(view.across.row_sizes)
        step = steps(view, 0.25 if number != 1 else 0.001)
        if number != 2:
            step, scale = log_step(step), log_step(scale * 0.999)
        else:
            scale = scale * 1.1
        numbers = torch.randn(shape, generator=RANDOM) if number == 0 else rows(view, shape)
        coded = fmt.encode(numbers.to(dtype), step, view, scale)
        stored.append(Stored((f"scaled {number}",), "parameter", coded, Decision(f"scaled {number}", "grid", 4.0, "")))
    return replace(first, tensors=(*stored, *first.tensors[:2], *first.tensors[-3:]))


MAKERS = {"v2": contents, "v3": contents_of_version_3, "v4": contents_of_version_4, "v5": contents_of_version_5}

if __name__ == "__main__":
    folder = FOLDER / sys.argv[1]
    folder.mkdir(exist_ok=False)
    for kind in FILE_NAMES:
        (folder / f"net.{kind}").write_bytes(storage.to_bytes(MAKERS[sys.argv[1]](), kind))
    decoded = {s.name: s.coded.decode() for s in MAKERS[sys.argv[1]]().tensors if s.decision.treatment != "made"}
    torch.save(decoded, folder / "decoded.pt")
