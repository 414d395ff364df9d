"""Check the rules of style that ruff and import-linter do not: words, circles, lengths."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from helpers.vocabulary import find_banned

from shared.streams import DEFAULT_STREAMS, Kind
from train.walkthrough import STREAM_OF_HEAD

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("shared", "preprocess", "train")
MAX_POSITIONAL = 4
MAX_BODY_LINES = 60

SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def imports_of(module: str) -> set[str]:
    """Modules of ours that a module imports, for type checking only or not."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(SOURCES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & SOURCES.keys()
            names |= submodules or {node.module}
    return (names & SOURCES.keys()) - {module}


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """Modules left after removing, again and again, those that import nothing that is left."""
    left = dict(graph)
    while leaves := [name for name, imported in left.items() if not imported & left.keys()]:
        for name in leaves:
            del left[name]
    return sorted(left)


def functions() -> Iterator[tuple[str, Function]]:
    """Every function of the source, as "file:line name"."""
    for path in SOURCES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, Function):
                yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node


def body_lines(function: Function) -> int:
    """Lines from the first statement after the docstring to the last."""
    statements = function.body[1:] if ast.get_docstring(function) else function.body
    return function.body[-1].end_lineno - statements[0].lineno + 1 if statements else 0


def test_no_modules_import_each_other_in_a_circle():
    assert len(SOURCES) > 50
    assert circle_in({name: imports_of(name) for name in SOURCES}) == []


def test_a_circle_of_three_is_found_and_what_stands_on_it_too():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"d"}}
    assert circle_in(graph) == ["a", "b", "c"]


def test_no_function_takes_more_than_four_positional_arguments():
    too_many = [
        name
        for name, function in functions()
        if len([*function.args.posonlyargs, *function.args.args])
        - (function.args.args[:1] != [] and function.args.args[0].arg in {"self", "cls"})
        > MAX_POSITIONAL
    ]
    assert too_many == []


def test_no_function_is_longer_than_sixty_lines():
    assert [name for name, function in functions() if body_lines(function) > MAX_BODY_LINES] == []


MAY_NAME_STREAMS = ("shared/streams.py", "train/walkthrough.py", "preprocess/demo/")
"""The default recipe, the walkthrough's rules, and the demo world; all else asks for a kind."""

STREAM_NAMES = {*DEFAULT_STREAMS, *STREAM_OF_HEAD} - {*Kind}


def stream_literals(source: str) -> list[str]:
    """String literals that are the name of a default stream, except in docstrings."""
    tree = ast.parse(source)
    prose = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        f"{node.lineno} {node.value}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node not in prose and node.value in STREAM_NAMES
    ]


def test_no_module_knows_a_stream_by_its_name():
    found = {
        str(path.relative_to(ROOT)): names
        for path in SOURCES.values()
        if not str(path.relative_to(ROOT)).startswith(MAY_NAME_STREAMS)
        if (names := stream_literals(path.read_text(encoding="utf-8")))
    }
    assert found == {}


def test_a_stream_name_in_code_is_found_and_one_in_a_docstring_is_not():
    assert stream_literals('"""touch"""\nx = {"touch": 1}\n') == ["2 touch"]


def test_the_words_that_the_style_bans_are_not_used():
    matches = find_banned(ROOT)
    assert not matches, "\n" + "\n".join(map(str, matches))


@pytest.mark.parametrize(
    ("file", "text", "word"),
    [
        ("docs/page.md", "It is made anew.\n", "anew"),
        ("docs/page.md", "The file lies in a folder.\n", "lie"),
        ("shared/module.py", '"""Mend the set."""\n', "mend"),
        ("shared/module.py", "x = 1  # so many bytes\n", "so many"),
        ("shared/module.py", 'raise ValueError(f"{x} was told to go")\n', "told"),
        ("train/module.py", "def f(place):\n    pass\n", "name place"),
        ("train/module.py", "pieces = [1]\n", "name pieces"),
        ("train/whence.py", "", "name whence"),
    ],
)
def test_the_checker_finds_a_banned_word(tmp_path, file, text, word):
    (tmp_path / "Makefile").touch()
    (tmp_path / "pyproject.toml").touch()
    path = tmp_path / file
    path.parent.mkdir()
    path.write_text(text)
    assert [match.word for match in find_banned(tmp_path)] == [word]
