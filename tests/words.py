"""Phrases that a native speaker would not write, and what to write instead: `python -m tests.words` lists them.

`tests/test_words.py` fails where one occurs.
"""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SEARCHED = (
    "src/**/*.py", "examples/*.py", "bench/*.py", "src/**/*.md", "docs/**/*.md", "docs/*.py", "*.md",
    "Makefile", ".github/**/*.*",
)  # fmt: skip


# A regular expression (case does not matter, ^ and $ are the ends of a line), and what to write instead.
INSTEAD = {
    r"\bso many\b": "the number: 'n bytes', 'that number of rows'",
    r"(?<!there )\b(?:is|are) no (?!longer|more|less|fewer|better|worse|different)\w+": "'is not a ...', 'are not ...'",
    r"\bby (?:itself|themselves|oneself)\b": "'alone', 'on its own', 'automatically', or nothing",
    r"(?<=\"\"\")(?:Of|For|From) (?!example)\w+": "a noun or a verb first: 'The size of ...', 'Compute ...'",
    r"^ +\w+: of (?=\w)": "what it is first: 'nbytes: the size of the file'",
    r", about[.:]?$": "'about' before what it belongs to",
    r"\bwhoever\b": "who it is: 'callers', 'readers', 'a program that'",
    r"\banew\b": "'again'",
    r"\bin turns\b": "'in turn', 'alternately'",
    r"\bfor ever\b": "'forever', or how long",
    r"\bbears? (?:the|its|an?|our) names?\b|\bbears? the names of\b": "'has the name', 'is called'",
    r"\bsuch (?:a one|ones)\b": "the noun again",
    r"\bby way of\b": "'via', 'through'",
    r"\bmends?\b|\bmended\b": "'fix', 'correct'",
    r"\bat the user's\b": "'on the user's machine'",
    r"\bthis page says of it|\bis said of\b|\bsaid it of\b": "'this page says about it'",
    r"\bworkshops?\b|\blattices?\b|\bkeepers?\b|\bsolvers?\b|\btryouts?\b|\ballowances?\b|\bfurther columns?\b": (
        "the word that replaced it: 'compressor', 'exact grid', 'stored form', 'rounding method', 'module damage', "
        "'memory limit', 'extra columns'"
    ),
    r"\b(?:all|nothing|none|no\w*) but for\b|, but for\b": "'except', 'apart from'",
    r"\bone's own\b": "'your own'",
    r"\bwhat is said\b|\bas is said\b|\bis said so\b": "who says it: 'the message', 'the report'",
}
PATTERNS = {pattern: re.compile(pattern, re.IGNORECASE | re.MULTILINE) for pattern in INSTEAD}


def found() -> Iterator[tuple[str, int, str, str]]:
    """The file, the line, the phrase as it stands there, and what to write instead."""
    for path in sorted({path for pattern in SEARCHED for path in ROOT.glob(pattern)}):
        for line, phrase, instead in found_in(path.read_text(encoding="utf-8")):
            yield path.relative_to(ROOT).as_posix(), line, phrase, instead


def found_in(text: str) -> Iterator[tuple[int, str, str]]:
    """The line, the phrase as it stands there, and what to write instead."""
    for pattern, expression in PATTERNS.items():
        for match in expression.finditer(text):
            yield text.count("\n", 0, match.start()) + 1, match[0].strip(), INSTEAD[pattern]


def main() -> None:
    """Every place, and how often each phrase stands anywhere."""
    places = sorted(found())
    print("\n".join(f"{name}:{line}: {phrase!r}: write {instead}" for name, line, phrase, instead in places))
    for instead, count in Counter(place[-1] for place in places).most_common():
        print(f"{count:5} write {instead}")
    print(f"{len(places)} phrases in {len({place[0] for place in places})} files")


if __name__ == "__main__":
    main()
