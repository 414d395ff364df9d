"""Find words that the project's style bans, in names, docstrings, comments, messages and docs.

    python tests/helpers/vocabulary.py                 every match, then counts
    python tests/helpers/vocabulary.py train/loop      only below this folder
    python tests/helpers/vocabulary.py --counts ROOT   counts of another checkout

Prose is checked in Markdown files, in docstrings, comments and string literals of Python files, and
in comments of YAML files. Names are checked where they are defined: modules, classes, functions,
parameters and variables.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]

PROSE = {
    "whence": r"whence",
    "whoever": r"who(so)?ever",
    "anew": r"anew",
    "mend": r"mend(s|ed|ing)?",
    "lie": r"lies|lain|(lie|lay)(?= (in|on|at|where|beside|there)\b)",
    "told": r"told",
    "oddity": r"oddit(y|ies)",
    "be it": r"be it(?= )",
    "it is no": r"it is no(?= )",
    "so many": r"so many",
    "what of": r"what of|what became of|what came of",
    "of which (first)": r"(?<=[.:;] )Of which|^Of which",
    "nobody": r"nobody|nowhere",
    "amid": r"amid(st)?|midst",
    "heed": r"heed(s|ed)?|beware|behold|hither|thither|thereof|therein|herein",
    "creature": r"creatures?",
    "senses": r"senses|eyes",
}
"""Banned words of prose, by the name under which they are reported, as regular expressions."""

NAMES = {
    "place", "places", "piece", "pieces", "given", "found", "what", "facts", "draft", "drafts",
    "shown", "whence", "whose", "lies", "lay", "told", "tell", "say", "mend", "mended", "mends",
    "here", "there", "rest", "thing", "things", "oddity", "oddities", "creature", "eyes",
}  # fmt: skip
"""Banned names: as a whole, or as the first or last word of a longer one for MARKED."""

MARKED = {
    "place",
    "piece",
    "mend",
    "tell",
    "told",
    "whence",
    "facts",
    "oddity",
    "oddities",
    "draft",
}
"""Banned also as the first or last word of a name, as in ``tell_remarks``."""

ALLOWED = {
    ("preprocess/demo/", "senses"),  # the demo world has eyes
    ("preprocess/demo/", "creature"),
    ("tests/helpers/vocabulary.py", "*"),
}
"""(Start of a path, word or ``*``): right uses."""

IGNORED = re.compile(
    r"MultiModalCreature|multimodal_creature|vr[-_]creature|VR creature|checkpoints/\S+|`[^`\n]*`"
)
"""Text that is not prose: names that the user fixed, and code in backticks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """One banned word."""

    path: str
    line: int
    word: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.word!r} in {self.text.strip()[:110]!r}"


def find_banned(root: Path = ROOT, below: str = "") -> list[Match]:
    """Return every banned word of a checkout that is not an allowed use."""
    matches = []
    for path in sorted(_files(root)):
        name = path.relative_to(root).as_posix()
        if name.startswith(below):
            text = path.read_text(encoding="utf-8")
            matches += [m for m in _check(name, text) if not _is_allowed(m)]
    return matches


def _files(root: Path) -> Iterator[Path]:
    for folder in ("shared", "preprocess", "train"):
        yield from (root / folder).rglob("*.py")
        yield from (root / folder).rglob("*.j2")
    yield from root.glob("*.md")
    yield from (root / "docs").glob("*.md")
    yield from (root / "configs").glob("*.yaml")
    yield from (root / "Makefile", root / "pyproject.toml")


def _check(name: str, text: str) -> Iterator[Match]:
    if name.endswith(".py"):
        yield from _check_names(name, text)
    for line, prose in (
        _python_prose(text) if name.endswith(".py") else enumerate(text.split("\n"), 1)
    ):
        for offset, part in enumerate(IGNORED.sub("", prose).split("\n")):
            for word, pattern in PROSE.items():
                if re.search(rf"\b(?:{pattern})\b", part, re.IGNORECASE):
                    yield Match(path=name, line=line + offset, word=word, text=part)


def _python_prose(text: str) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of comments, docstrings and string literals."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)}
        is_prose = token.type in kinds and " " in token.string.strip("\"'# ")
        if is_prose:
            yield token.start[0], token.string


def _check_names(name: str, text: str) -> Iterator[Match]:
    yield from _banned_name(name, 1, Path(name).stem)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _banned_name(name, node.lineno, node.name)
        elif isinstance(node, ast.arg):
            yield from _banned_name(name, node.lineno, node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield from _banned_name(name, node.lineno, node.id)


def _banned_name(path: str, line: int, name: str) -> Iterator[Match]:
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().strip("_").split("_")
    if "_".join(words) in NAMES or {words[0], words[-1]} & MARKED:
        yield Match(path=path, line=line, word=f"name {name}", text=name)


def _is_allowed(match: Match) -> bool:
    return any(
        match.path.startswith(start) and word in ("*", match.word) for start, word in ALLOWED
    )


def main() -> None:
    """Print the matches and their counts."""
    arguments = [a for a in sys.argv[1:] if a != "--counts"]
    only_counts = "--counts" in sys.argv
    root = Path(arguments[0]) if only_counts and arguments else ROOT
    matches = [
        m
        for below in (arguments if not only_counts else []) or [""]
        for m in find_banned(root, below)
    ]
    if not only_counts:
        print(*matches, sep="\n")
    counts = Counter("name" if m.word.startswith("name ") else m.word for m in matches)
    print(len(matches), "in all:", ", ".join(f"{word} {n}" for word, n in counts.most_common()))


if __name__ == "__main__":
    main()
