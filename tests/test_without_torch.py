"""What `pip install pared` alone gives: files are read, compressed, expanded and compared; whatever takes a model says
what to install."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import pared

VERBS_OF_FILES = ("inspect", "compress", "expand", "compare")
BLOCKED = "import sys\nsys.modules['torch'] = None  # from here on `import torch` raises ModuleNotFoundError\n"


def without_torch(code: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process that cannot import torch."""
    command = [sys.executable, "-c", BLOCKED + code, *map(str, arguments)]
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})


def command(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return without_torch("from pared.cli import main\nsys.argv[0] = 'pared'\nmain()", *arguments, cwd=cwd)


@pytest.fixture
def weight(tmp_path: Path) -> np.ndarray:
    """The one weight of `model.safetensors` in the directory of the test."""
    weight = np.random.default_rng(0).normal(size=(64, 256)).astype("float32")
    save_file({"weight": weight}, tmp_path / "model.safetensors")
    return weight


@pytest.mark.child
def test_the_command_line_works_on_files(tmp_path: Path, weight: np.ndarray) -> None:
    shown = {
        arguments[0]: command(*arguments, cwd=tmp_path)
        for arguments in (
            ("compress", "model.safetensors", "-o", "small"),
            ("expand", "small", "-o", "large.safetensors"),
            ("inspect", "small"),
            ("compare", "model.safetensors", "small"),
        )
    }
    assert {verb: (done.returncode, done.stderr) for verb, done in shown.items()} == dict.fromkeys(shown, (0, ""))
    assert "weight" in shown["inspect"].stdout
    assert "weight" in shown["compare"].stdout
    assert (tmp_path / "small" / "best_model.pt").stat().st_size < 0.3 * weight.nbytes
    np.testing.assert_allclose(load_file(tmp_path / "large.safetensors")["weight"], weight, atol=0.02)


@pytest.mark.child
def test_python_works_on_files(tmp_path: Path, weight: np.ndarray) -> None:
    code = """if True:
        import pared
        pared.compress("model.safetensors", "small", quiet=True)
        pared.expand("small", "large.safetensors", quiet=True)
        [row] = [row for row in pared.inspect("large.safetensors").rows if row.shape]
        print(row.name, row.shape, len(pared.compare("model.safetensors", "small").pairs))
    """
    done = without_torch(code, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("weight (64, 256) 1\n", "")


@pytest.mark.child
def test_every_other_name_says_what_to_install(tmp_path: Path) -> None:
    code = """if True:
        import pared
        for name in pared.__all__:
            try:
                getattr(pared, name)
            except pared.ParedError as error:
                print(f"{type(error).__name__}: {error}")
    """
    done = without_torch(code, cwd=tmp_path)
    assert done.stderr == ""
    remedy = "  pip install 'pared[torch]' (inspect, compress, expand and compare work on files without it)"
    needing = [line.removeprefix("ConfigError: pared.") for line in done.stdout.splitlines() if line != remedy]
    names = {line.removesuffix(": needs torch, which is not installed") for line in needing}
    assert done.stdout.count(remedy) == len(names)
    verbs = {name for name in pared.__all__ if name.islower() and not name.startswith("_")}
    assert names & verbs == verbs - {*VERBS_OF_FILES}
    assert not {name for name in names if name.endswith("Error")}


@pytest.mark.child
def test_a_script_shows_one_traceback_that_ends_with_what_to_install(tmp_path: Path) -> None:
    done = without_torch("import pared\npared.fit", cwd=tmp_path)
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.splitlines()[-1].startswith("  pip install 'pared[torch]'")


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("fit", "tests.test_cli:factory", "-o", "small"), "pared.fit"),
        (("fit", "tests.test_cli:factory", "--dry-run"), "pared.fit"),
        (("tune-speed", "small", "--model", "a:b", "--calib", "a:c"), "pared.tune_speed"),
    ],
)
@pytest.mark.child
def test_the_command_line_says_what_to_install(tmp_path: Path, arguments: tuple[str, ...], name: str) -> None:
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {name}: needs torch, which is not installed\n"
        "  pip install 'pared[torch]' (inspect, compress, expand and compare work on files without it)\n"
    )
    assert list(tmp_path.iterdir()) == []  # nothing half done


def test_a_module_that_is_missing_for_another_reason_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pared.runtime.layers.table", None)
    monkeypatch.delitem(vars(pared), "register", raising=False)
    with pytest.raises(ModuleNotFoundError, match="pared.runtime.layers.table"):
        _ = pared.register
