"""The command line: the same words, errors without tracebacks, nothing half done."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import pared
from pared import cli
from pared.errors import ConfigError


def factory() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 16))


def calibration() -> list[torch.Tensor]:
    return [torch.randn(16, 64)]


def score(model: nn.Module) -> float:
    return 1.0 + float(model(torch.ones(1, 64)).detach().abs().mean())


HERE = "tests.test_cli"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit status of `pared ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["pared", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


@pytest.mark.slow
def test_fit_writes_a_model_that_loads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--calib", f"{HERE}:calibration", "--eval", f"{HERE}:score", "--tolerable-loss", "0.05"]
    assert run(monkeypatch, "fit", f"{HERE}:factory", *options, "-o", str(tmp_path / "out")) == 0
    shown = capsys.readouterr().out
    assert "criterion met" in shown
    assert "0.weight" in shown
    assert f"written: {tmp_path / 'out' / 'best_model.pt'}" in shown
    assert "criterion" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    loaded = pared.load(tmp_path / "out", model=factory())
    assert loaded.met


def test_a_page_is_not_written_over_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(factory().state_dict(), tmp_path / "a.pt")
    before = (tmp_path / "a.pt").read_bytes()
    assert run(monkeypatch, "inspect", str(tmp_path / "a.pt"), "--html", str(tmp_path / "a.pt")) == 2
    assert "a.pt: is the file to inspect" in capsys.readouterr().err
    assert (tmp_path / "a.pt").read_bytes() == before


def test_errors_do_not_steer_the_terminal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"\x1b[2J": torch.full((4, 4), torch.nan)}, tmp_path / "a.pt")
    assert run(monkeypatch, "compress", str(tmp_path / "a.pt"), "-o", str(tmp_path / "out")) == 2
    shown = capsys.readouterr().err
    assert r"error: \x1b[2J: holds NaN (16 of 16 numbers" in shown
    assert "\x1b" not in shown


def test_without_the_drawing_libraries_all_but_the_page_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(monkeypatch, "fit", f"{HERE}:factory", "-o", str(tmp_path)) == 0
    shown = capsys.readouterr()
    assert "0.weight" in shown.out
    assert "no report.html" in shown.err
    assert "pip install 'pared[report]'" in shown.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best_model.pt", "deploy.yaml", "engine.json"]


def test_a_curve_that_cannot_be_drawn_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(f"{HERE}.factory", lambda: pytest.fail("built"))
    assert run(monkeypatch, "fit", f"{HERE}:factory", "--curve", "-o", str(tmp_path / "new")) == 2
    assert "pip install 'pared[report]'" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_inspect_writes_a_page(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(factory().state_dict(), tmp_path / "float.pt")
    assert run(monkeypatch, "inspect", str(tmp_path / "float.pt"), "--json", "--html", str(tmp_path / "a.html")) == 0
    assert json.loads(capsys.readouterr().out)["file"].endswith("float.pt")
    assert ">0.weight<" in (tmp_path / "a.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_search_is_recorded_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--calib", f"{HERE}:calibration", "--eval", f"{HERE}:score", "--tolerable-loss", "0.05"]
    options += ["--workspace", str(tmp_path / "search")]
    assert run(monkeypatch, "fit", f"{HERE}:factory", *options, "-o", str(tmp_path / "one")) == 0
    monkeypatch.setattr(f"{HERE}.score", lambda _: pytest.fail("scored again"))
    assert run(monkeypatch, "fit", f"{HERE}:factory", *options, "-o", str(tmp_path / "other")) == 0
    one, other = ((tmp_path / name / "best_model.pt").read_bytes() for name in ("one", "other"))
    assert one == other
    assert "trial" in capsys.readouterr().out


@pytest.mark.slow
def test_a_curve_is_written_as_json_and_as_a_picture(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--calib", f"{HERE}:calibration", "--eval", f"{HERE}:score", "--curve", "-o", str(tmp_path)]
    assert run(monkeypatch, "fit", f"{HERE}:factory", *options) == 0
    found = json.loads((tmp_path / "curve.json").read_text())
    assert len(found["points"]) == 8
    assert (tmp_path / "curve.svg").read_text().startswith("<svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curve.json", "curve.svg"]
    assert f"written: {tmp_path / 'curve.json'}" in capsys.readouterr().out


def test_eight_bits_can_be_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = ["--calib", f"{HERE}:calibration", "--quant-level", "0", "-q", "-o", str(tmp_path)]
    assert run(monkeypatch, "fit", f"{HERE}:factory", *options) == 0
    lines = {line.name: line for line in pared.load(tmp_path, model=factory()).plan}
    assert lines["0.weight"].bits == 8


def test_quiet_says_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "fit", f"{HERE}:factory", "-q", "-o", str(tmp_path)) == 0
    assert capsys.readouterr() == ("", "")


def test_a_dry_run_predicts_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--calib", f"{HERE}:calibration", "-o", str(tmp_path / "out")]
    assert run(monkeypatch, "fit", f"{HERE}:factory", *where, "--dry-run") == 0
    shown = capsys.readouterr().out
    guessed = int(shown.split(" bytes")[0].removeprefix("at 8 bits about ").replace(",", ""))
    assert not (tmp_path / "out").exists()
    assert guessed == pytest.approx(pared.fit(factory()).nbytes, rel=0.15)
    assert "nothing was written" in shown


@pytest.mark.parametrize(
    ("rule", "bits", "treatment"),
    [("0.weight=4", 4.0, "grid"), ("0=keep", None, "exact"), ("*.weight=2.5", 2.5, "grid")],
)
def test_rules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rule: str, bits: float | None, treatment: str) -> None:
    assert run(monkeypatch, "fit", f"{HERE}:factory", "-q", "--rule", rule, "-o", str(tmp_path)) == 0
    line = pared.load(tmp_path, model=factory()).plan[0]
    assert (line.bits, line.treatment) == (bits, treatment)


# Each verb with an empty path in each place.
EMPTY = [
    ["fit", f"{HERE}:factory", "-o", ""],
    ["fit", f"{HERE}:factory", "-o", "x", "--workspace", ""],
    ["tune-speed", "", "--model", f"{HERE}:factory", "--calib", f"{HERE}:calibration"],
    ["compress", "", "-o", "x"],
    ["compress", "y", "-o", ""],
    ["expand", "", "-o", "x"],
    ["expand", "y", "-o", ""],
    ["inspect", ""],
    ["inspect", "y", "--html", ""],
    ["compare", "", "y"],
    ["compare", "a.pt", ""],
]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["fit", "nowhere:factory", "-o", "x"],
            "error: nowhere:factory: cannot be imported (No module named 'nowhere')",
        ),
        (
            ["fit", f"{HERE}:nothing", "-o", "x"],
            "cannot be imported (module 'tests.test_cli' has no attribute 'nothing')",
        ),
        (["fit", f"{HERE}:factory"], "error: pared fit: no directory to write to\n  Pass -o DIRECTORY, or --dry-run."),
        (["fit", f"{HERE}:factory", "-o", "x", "--approach", "statc"], "approach='statc' is not one of"),
        (["fit", f"{HERE}:factory", "-o", "x", "--rule", "a=b=c"], "error: --rule: 'a=b=c' is not a rule"),
        (
            ["fit", f"{HERE}:factory", "-o", "x", "--rule", "zzz=4"],
            "error: Rule('zzz'): matches no tensor of the model",
        ),
        (["fit", f"{HERE}:factory", "-o", "x", "--max-size", "lots"], "error: max_size: 'lots' is not a size"),
        (
            ["fit", f"{HERE}:factory", "-o", "x", "--curve", "--workspace", "y"],
            "error: pared fit: --curve excludes --workspace, --confirm and --dry-run",
        ),
        (["inspect", "missing.pt"], "missing.pt"),
        *(([*words], "the path is empty\n  Pass the path of a file or folder") for words in EMPTY),
        (
            ["fit", f"{HERE}:factory", "-o", "x", "--calib", f"{HERE}:calibration", "--logits", "b"],
            "has no floating output 'b'",
        ),
        (["inspect", "x.pt", "--quick", "--deep"], "error: pared inspect: --quick and --deep contradict each other"),
    ],
)
def test_errors_are_shown_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(factory().state_dict(), "a.pt")
    assert run(monkeypatch, *arguments) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert not (tmp_path / "x" / "best_model.pt").exists()


def test_an_unwritable_target_is_refused_before_the_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(pared, "fit", lambda *_: pytest.fail("work was begun"))
    assert run(monkeypatch, "fit", f"{HERE}:factory", "-o", str(tmp_path / "file" / "out")) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_inspect_shows_a_table_or_json(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = pared.save(pared.fit(factory()), tmp_path)
    assert run(monkeypatch, "inspect", str(tmp_path)) == 0
    shown = capsys.readouterr().out
    assert "grid int8" in shown
    assert max(len(line) for line in shown.splitlines()) <= 100
    assert run(monkeypatch, "inspect", str(path), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(row["bytes"] for row in found["rows"]) == found["bytes"] == path.stat().st_size


@pytest.mark.child
def test_inspecting_a_file_imports_no_torch(tmp_path: Path) -> None:
    pared.save(pared.fit(factory()), tmp_path)
    save_file(factory().state_dict(), tmp_path / "plain.safetensors")
    torch.save(factory().state_dict(), tmp_path / "plain.pt")
    code = (
        "import sys\nfrom pared import cli\nsys.argv = ['pared', 'inspect', sys.argv[1]]\n"
        "try:\n    cli.main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    for name in ("best_model.pt", "plain.safetensors", "plain.pt"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=True, capture_output=True)


@pytest.mark.child
def test_the_module_is_the_command() -> None:
    shown = subprocess.run([sys.executable, "-m", "pared", "--version"], check=True, capture_output=True, text=True)
    assert shown.stdout == f"pared {pared.__version__}\n"


@pytest.mark.parametrize(("option", "kinds"), [("--quick", []), ("--deep", ["duplicate"]), ("--json", ["duplicate"])])
def test_inspect_reads_as_much_as_it_is_told(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    option: str,
    kinds: list[str],
) -> None:
    weight = torch.randn(100, 100)
    torch.save({"a": weight, "b": weight.clone()}, tmp_path / "net.pt")
    assert run(monkeypatch, "inspect", str(tmp_path / "net.pt"), "--json", *{option} - {"--json"}) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [finding["kind"] for finding in shown["findings"]] == kinds


def test_inspect_reads_as_deep_as_it_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(factory().state_dict(), tmp_path / "plain.safetensors")
    asked = []
    inspect = pared.inspect

    def noting(path: Path, **options: Any) -> pared.Ledger:
        asked.append(options)
        return inspect(path, **options)

    monkeypatch.setattr(pared, "inspect", noting)
    for flags in ([], ["--quick"], ["--deep"]):
        assert run(monkeypatch, "inspect", str(tmp_path), *flags) == 0
    assert asked == [{}, {"depth": "quick"}, {"depth": "deep"}]
    capsys.readouterr()
    assert run(monkeypatch, "inspect", str(tmp_path), "--quick", "--deep") == 2
    assert capsys.readouterr().err == (
        "error: pared inspect: --quick and --deep contradict each other\n  Pass one of them, or neither.\n"
    )
    with pytest.raises(ConfigError) as error:
        inspect(tmp_path, depth="deeper")
    assert str(error.value) == "inspect: 'deeper' is not a depth\n  Pass one of quick, default, deep."
