"""The README's Python runs as it stands."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.slow
def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}  # the later ones go on where the earlier ones ended
    for code in blocks:
        exec(compile(code, "README.md", "exec"), names)
    assert (tmp_path / "out" / "readme" / "best_model.pt").is_file()
    shown = capsys.readouterr().out
    assert "the output layer" in shown
    assert "4 in both, 4 equal" in shown  # of the comparison
