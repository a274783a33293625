"""Every tutorial and recipe runs as it stands, and prints what the page shows."""

import importlib.util
import re
from pathlib import Path

import pytest

import pared
from tests import documents

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/tutorials/*.md")), *sorted(ROOT.glob("docs/how-to/*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_the_page_runs_and_prints_what_it_shows(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for shown in documents.run(page.read_text(encoding="utf-8")):
        assert documents.agrees(shown.expected, shown.printed), f"{shown.code}\n{shown.printed}"


def test_every_tutorial_shows_output_that_is_checked() -> None:
    """Otherwise the test above would hold of pages that show nothing."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert re.search(r"^```(text|console)\n.*\w", text, re.MULTILINE), page


def test_the_reference_has_every_public_name() -> None:
    pages_of_names = [
        (ROOT / "docs" / "reference" / name).read_text(encoding="utf-8") for name in ("api.md", "errors.md")
    ]
    named = set(re.findall(r"^::: pared\.(\w+)$", "\n".join(pages_of_names), re.MULTILINE))
    assert set(pared.__all__) - {"__version__"} <= named


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_the_links_of_the_readme_lead_somewhere() -> None:
    links = re.findall(r"(?:\]\(|src=\"|srcset=\")([^)\"]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.child
def test_generated_parts_are_current() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    for name, (page, _) in generate.PARTS.items():
        assert page.read_text(encoding="utf-8") == generate.filled(name), "run `python docs/generate.py`"
