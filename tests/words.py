"""Phrases that a native speaker would not write, and what to write instead: `python -m tests.words` lists them.

Not enforced yet. To enforce it, add a test that says `assert list(found()) == []`.
"""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SEARCHED = ("src/**/*.py", "examples/*.py", "docs/**/*.md", "*.md")

# A regular expression (case does not matter), and what to write instead.
INSTEAD = {
    r"\bso many\b": "the number: 'n bytes', 'that number of rows'",
    r"(?<!there )\b(?:is|are) no (?!longer|more|less|fewer|better|worse|different)\w+": "'is not a ...', 'are not ...'",
    r"\bby (?:itself|themselves|oneself)\b": "'alone', 'on its own', 'automatically', or nothing",
    r"(?<=\"\"\")(?:Of|For|From) (?!example)\w+": "a noun or a verb first: 'The size of ...', 'Compute ...'",
    r"(?m), about[.:]?$": "'about' before what it belongs to",
    r"\bwhoever\b": "who it is: 'callers', 'readers', 'a program that'",
    r"\banew\b": "'again'",
    r"\b(?:all|nothing|none|no\w*) but for\b|, but for\b": "'except', 'apart from'",
    r"\bone's own\b": "'your own'",
    r"\bwhat is said\b|\bas is said\b|\bis said so\b": "who says it: 'the message', 'the report'",
}
PATTERNS = {pattern: re.compile(pattern, re.IGNORECASE) for pattern in INSTEAD}


def found() -> Iterator[tuple[str, int, str, str]]:
    """The file, the line, the phrase as it stands there, and what to write instead."""
    paths = sorted({path for pattern in SEARCHED for path in ROOT.glob(pattern)})
    for path in paths:
        name = path.relative_to(ROOT).as_posix()
        text = path.read_text(encoding="utf-8")
        for pattern, expression in PATTERNS.items():
            for match in expression.finditer(text):
                yield name, text.count("\n", 0, match.start()) + 1, match[0], INSTEAD[pattern]


def main() -> None:
    """Every place, and how often each phrase stands anywhere."""
    places = sorted(found())
    print("\n".join(f"{name}:{line}: {phrase!r}: write {instead}" for name, line, phrase, instead in places))
    for instead, count in Counter(place[-1] for place in places).most_common():
        print(f"{count:5} write {instead}")
    print(f"{len(places)} phrases in {len({place[0] for place in places})} files")


if __name__ == "__main__":
    main()
