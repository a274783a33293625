"""The public names: one list, which type checkers, editors and programs read alike."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mypy import api

import pared

ROOT = Path(__file__).parent.parent
CALLS = {
    "pared.fit(net)": "torch.nn.modules.linear.Linear",
    "pared.load('d', net)": "torch.nn.modules.linear.Linear",
    "pared.load('d', engine='auto')": "torch.nn.modules.module.Module",
    "pared.tune_speed('d', net, [])": "torch.nn.modules.linear.Linear",
    "pared.trade_off(net)": "pared.artifact.outcome.Curve",
    "pared.calibration('a', 'b')": "list[dict[str, torch._tensor.Tensor]]",
    "pared.estimate(net)": "pared.fitting.estimate.Estimate",
    "pared.compress('a', 'b')": "pathlib.Path",
    "pared.expand('a', 'b')": "pathlib.Path",
    "pared.inspect('a')": "pared.inspection.ledger.Ledger",
    "pared.inspect('a').findings[0]": "pared.inspection.findings.finding.Finding",
    "pared.compare('a', 'b')": "pared.inspection.comparison.result.Comparison",
    "pared.save(net, 'd')": "pathlib.Path",
    "pared.export(net, 'd', x)": "pared.runtime.onnx.export.Exported",
    "pared.report(net)": "str",
    "pared.register(torch.nn.Linear)": "None",
    "pared.__version__": "str",
}


def test_every_name_is_there_and_nothing_else_is_listed() -> None:
    assert dir(pared) == pared.__all__ == sorted(set(pared.__all__))
    assert [name for name in pared.__all__ if getattr(pared, name, None) is None] == []
    with pytest.raises(AttributeError, match="nothing"):
        pared.nothing  # type: ignore[attr-defined]  # noqa: B018  # the mistake under test


def test_results_of_verbs_have_public_types() -> None:
    named = {"Comparison", "Curve", "Estimate", "Exported", "Finding", "Ledger", "Outcome", "Row", "Runner", "Trial"}
    assert named <= set(pared.__all__)


def test_every_argument_of_a_verb_is_described() -> None:
    verbs = [verb for name in pared.__all__ if inspect.isfunction(verb := getattr(pared, name))]
    assert {pared.fit, pared.estimate, pared.trade_off} <= set(verbs)
    for verb in verbs:
        described = set(re.findall(r"^ +(\w+): ", inspect.getdoc(verb) or "", re.MULTILINE))
        assert set(inspect.signature(verb).parameters) <= described, verb


@pytest.mark.child
def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, pared; pared.inspect, pared.compress, pared.expand, pared.compare, pared.Ledger, pared.Finding"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"], check=True)


def test_no_public_name_is_any_for_a_type_checker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MYPYPATH", str(Path(pared.__file__).parent.parent))
    names = [f"pared.{name}" for name in pared.__all__]
    lines = [
        "import torch",
        "import pared",
        "net = torch.nn.Linear(2, 2)",
        "x = torch.ones(1, 2)",
        *(f"reveal_type({expression})" for expression in (*names, *CALLS)),
    ]
    file = tmp_path / "user.py"
    file.write_text("\n".join(lines), encoding="utf-8")
    cache = ROOT / ".mypy_cache" / "public"
    settings = ["--config-file=", "--strict", "--follow-imports=silent", "--ignore-missing-imports", "--no-pretty"]
    output, errors, _ = api.run([*settings, f"--cache-dir={cache}", str(file)])
    assert errors == ""
    revealed = [line.split("Revealed type is ", 1)[1].strip('"') for line in output.splitlines() if "Revealed" in line]
    assert len(revealed) == len(names) + len(CALLS), output
    assert [name for name, kind in zip(names, revealed, strict=False) if kind == "Any"] == []
    assert dict(zip(CALLS, revealed[len(names) :], strict=True)) == CALLS
