"""Imports go down the floors, or to an earlier module of the same floor; nothing else is allowed."""

import ast
from pathlib import Path

import pared

SOURCE = Path(pared.__file__).parent

# Every module exactly once, lowest first; a module may import only what stands above it in this list.
ORDER = [
    # ground: no torch
    "version",
    "errors",
    "scalars",
    "sizes",
    "progress",
    "switches",
    "parallel",
    "entropy",
    "container.allowance",
    "container.checks",
    "container.files",
    "container.index",
    "container.zip_file",
    "container.safetensors_file",
    "container.torch_file",
    "container.envelope",
    "container.parts",
    "container.parse",
    "container",
    "pickles",
    "readers.listing",
    "readers.safetensors",
    "readers.torch_names",
    "readers.torch_pickle",
    "readers.torch_zip",
    "readers.torch_legacy",
    "readers.torch_export",
    "readers.numpy_files",
    "readers.gguf",
    "readers.protobuf",
    "readers.onnx_tensors",
    "readers.onnx",
    "readers.hdf5_headers",
    "readers.hdf5",
    "readers.keras_zip",
    "readers.kinds",
    "readers.folders",
    "readers.live",
    "readers",
    "naming",
    "selection",
    # any file: no torch
    "views",
    "streams",
    "grids",
    "lattices",
    "decoding",
    "likeness",
    "compression",
    "compression.rates",
    "compression.packing",
    "compression.entries",
    "compression.sampling",
    "compression.journal",
    "compression.companions",
    "compression.checkpoint",
    "compression.expansion",
    "findings.content",
    "findings.levels",
    "findings.looks",
    "findings.finding",
    "findings.structure",
    "findings.copies",
    "findings",
    "reporting",
    "reporting.drawing",
    "reporting.treemap",
    "reporting.charts",
    "outcome",
    "tables",
    "ledger",
    "reporting.facts",
    "reporting.page",
    # numbers
    "formats",
    "kernels.machine",
    "kernels.activation",
    "kernels.outliers",
    "kernels.linear",
    "kernels.patches",
    "kernels.conv",
    "kernels.transposed",
    "kernels.recurrent",
    "kernels",
    # parts of a model
    "tensors",
    "solvers",
    "config",
    "layers.activation",
    "layers.dispatch",
    "layers.halves",
    "layers.registry",
    "layers.counterpart",
    "layers.recurrent",
    "layers.attention",
    "layers.table",
    "layers",
    "outputs",
    "ranges",
    "calls",
    "stats",
    "products",
    "sensitivity",
    "perturbation",
    "feedback",
    "rounding",
    "ways",
    "profile",
    # decisions
    "plan",
    "contents",
    "candidates",
    "tryout",
    "allocate",
    # files and models
    "artifact",
    "reporting.lines",
    "reporting.text",
    "keeper",
    "install",
    "graphs.capture",
    "graphs.draft",
    "graphs.products",
    "graphs.merging",
    "graphs.attention",
    "graphs.fusion",
    "graphs.graph",
    "graphs.serving",
    "graphs.halved",
    "graphs.served",
    "graphs",
    "exporting.signature",
    "exporting.capture",
    "exporting.layout",
    "exporting.codes",
    "exporting.fold",
    "exporting.rewrite",
    "exporting",
    "record",
    "result",
    "model",
    "registration",
    # work
    "evaluate",
    "options",
    "workspace",
    "workshop",
    "search",
    "curve",
    "parts",
    "speed",
    "sources",
    "pairing",
    "comparison",
    "divergence",
    # face
    "engines",
    "forecast",
    "contrast",
    "api",
    "cli",
    "__main__",
]


def name_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """The modules of ours that a file imports, at the top or later."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name.removeprefix("pared.") for name in found if name.startswith("pared.")}


FILES = {name_of(path): path for path in SOURCE.rglob("*.py") if name_of(path)}


def test_every_module_has_its_floor() -> None:
    assert sorted(ORDER) == sorted(FILES)


def test_imports_go_down() -> None:
    wrong = [
        f"{name} imports {target}"
        for name, path in FILES.items()
        for target in imports(path)
        if target in ORDER and ORDER.index(target) >= ORDER.index(name)
    ]
    assert wrong == []


def test_files_are_small() -> None:
    long = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in FILES.items()}
    assert {name: lines for name, lines in long.items() if lines > 400} == {}
