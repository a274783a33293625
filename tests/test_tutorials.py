"""Every tutorial and recipe runs as it stands, and prints what the page shows."""

from pathlib import Path

import pytest

from tests import pages

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/tutorials/*.md")), *sorted(ROOT.glob("docs/how-to/*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_the_page_runs_and_prints_what_it_shows(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for shown in pages.run(page.read_text(encoding="utf-8")):
        if shown.expected is not None:
            assert pages.agrees(shown.expected, shown.printed), f"{shown.code}\n{shown.printed}"


def test_every_tutorial_shows_output_that_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = next(page for page in PAGES if page.name == "five-minutes.md")
    monkeypatch.chdir(tmp_path)
    assert sum(bool(shown.expected) for shown in pages.run(first.read_text(encoding="utf-8"))) >= 3
