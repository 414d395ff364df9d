"""Render report pages, and parse them by the standard library."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import TYPE_CHECKING

from preprocess.validate.page import ReportPage, render_session
from preprocess.validate.probe import probe_session
from preprocess.validate.report import check_session
from shared.recipe import Recipe
from shared.streams import DEFAULT_STREAMS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def default_recipe(*, without: tuple[str, ...] = (), required: tuple[str, ...] = ()) -> Recipe:
    """Return a recipe of the default streams but some, in segments of a second."""
    streams = {n: {**s, "required": n in required} for n, s in DEFAULT_STREAMS.items()}
    kept = {name: spec for name, spec in streams.items() if name not in without}
    return Recipe.model_validate({"segment": {"duration_s": 1.0}, "streams": kept})


def recipe_of(folder: Path) -> Recipe:
    """Return a recipe of the default streams whose files, keys and texts a session has."""
    recipe = default_recipe()
    probe = probe_session(folder, recipe=recipe)
    absent = tuple(
        name
        for name in recipe.streams
        if name not in probe.intervals and recipe.streams[name].file not in probe.unreadable
    )
    return default_recipe(without=absent if len(absent) < len(recipe.streams) else ())


RECIPE = default_recipe(without=("vision_right",))
VOID = {"meta", "br", "img", "hr", "input", "link"}


class Element:
    """An element of a parsed page."""

    def __init__(self, tag: str, attributes: dict[str, str]) -> None:
        self.tag, self.attributes = tag, attributes
        self.children: list[Element | str] = []

    def walk(self) -> Iterator[Element]:
        yield self
        for child in self.children:
            if isinstance(child, Element):
                yield from child.walk()

    def all(self, tag: str, **wanted: str) -> list[Element]:
        """Return elements of a tag whose attributes contain words (class_ for class)."""
        return [
            e
            for e in self.walk()
            if e.tag == tag
            and all(
                v in e.attributes.get(k.rstrip("_").replace("_", "-"), "").split()
                for k, v in wanted.items()
            )
        ]

    @property
    def text(self) -> str:
        return "".join(c if isinstance(c, str) else c.text for c in self.children)

    def number(self, name: str) -> float:
        return float(self.attributes[name])


class Parser(HTMLParser):
    """A strict tree builder: every element must be closed where it was opened."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Element("root", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {k: v or "" for k, v in attrs})
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Element(tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, (self.open[-1].tag, tag)
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def parse(path: Path) -> Element:
    parser = Parser()
    parser.feed(path.read_text(encoding="utf-8"))
    parser.close()
    assert parser.open == [parser.root]
    return parser.root


def render_page(*folders: Path, recipe: Recipe = RECIPE) -> Element:
    """Render and parse the page of some sessions, in a folder beside the first one."""
    path = folders[0].parent / "page" / "report.html"
    with ReportPage(path) as page:
        for folder in folders:
            page.add(render_session(check_session(folder, recipe=recipe)))
    return parse(path)


def panel(page: Element, name: str) -> Element:
    (element,) = page.all("svg", data_panel=name)
    return element


def row(page: Element, name: str) -> Element:
    groups = panel(page, "timeline").all("g")
    (element,) = [e for e in groups if e.attributes.get("data-row") == name]
    return element


def bands_s(page: Element, parent: Element, kind: str) -> list[tuple[float, float]]:
    """Return (start, stop) in seconds of the bands of a kind, by the page's own scale."""
    timeline = panel(page, "timeline")
    start_s, stop_s = timeline.number("data-start-s"), timeline.number("data-stop-s")
    unit_s = (stop_s - start_s) / 1000
    return [
        (
            start_s + band.number("x") * unit_s,
            start_s + (band.number("x") + band.number("width")) * unit_s,
        )
        for band in parent.all("rect", class_=kind)
    ]


def messages(page: Element) -> list[str]:
    return [item.text for item in page.all("li")]
