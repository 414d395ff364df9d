"""Name sessions, and find the files and keys of a session that no declared stream uses.

Names of folders are bytes, which a machine decodes by its locale. Names of sessions are these bytes
as UTF-8 everywhere, so that keys and splits don't depend on the machine.
"""

from __future__ import annotations

import difflib
import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

SOUND_SUFFIXES = frozenset({
    ".wav", ".wave", ".aac", ".aif", ".aiff", ".au", ".caf", ".flac", ".m4a", ".mka", ".mp3",
    ".oga", ".ogg", ".opus", ".w64", ".wma",
})  # fmt: skip
"""Files that are sound."""

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts"}
)
LINE_SUFFIXES = frozenset({".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt"})

_FORMS = (VIDEO_SUFFIXES, SOUND_SUFFIXES, LINE_SUFFIXES)
_VIDEO, _SOUND = 0, 1

_LIKENESS = 0.76
"""Names that are at least this similar are probably meant to be the same."""

_SHORT_LIKENESS, _SHORT = 0.75, 5
"""The same for names of few letters, of which one wrong letter is a large part."""

_PREFIX_LIKENESS = 0.9
_MIN_PREFIX = 4
"""A name that begins like another, with at least this many letters, is probably meant to be it."""

_MAX_COMPARED = 100
"""Names of a file that are compared with as many others."""

_MAX_LISTED = 8
_MAX_NAME = 80

_COMPANION = re.compile(
    r"[.~].*|(readme|licen[sc]e|copying|notice)\b.*|session\.json|thumbs\.db|desktop\.ini"
    r"|__macosx|lost\+found|.*\.orig(\.\d+)?|.*(\.bak|\.tmp|~)",
    re.IGNORECASE,
)
"""Files and folders that belong beside recordings."""


def session_name(folder: Path) -> str:
    """Return the name of a folder's session; bytes that are not UTF-8 become surrogates."""
    return os.fsencode(folder.name).decode("utf-8", "surrogateescape")


def session_folder(parent: Path, name: str) -> Path:
    """Return the folder of a session below another; the inverse of :func:`session_name`."""
    return parent / os.fsdecode(name.encode("utf-8", "surrogateescape"))


def typed_name(argument: str) -> str:
    """Return the name of a session, or a key, that was given on the command line."""
    try:
        return os.fsencode(argument).decode()
    except UnicodeDecodeError:  # typed in the encoding of the locale
        return argument


def explain_bad_name(name: str) -> str:
    """Explain why a session can't have a name; empty if it can."""
    if name.isprintable():  # tar readers and JSON take it as part of keys
        return ""
    bad = next(char for char in name if not char.isprintable())
    fault = f"contains {printable(bad)}, which is not printable"
    if unicodedata.category(bad) == "Cs":
        fault = "is not UTF-8"
    return f"the name of its folder {fault}; fix: rename the folder"


def printable(text: str) -> str:
    """Escape the characters that a terminal or a JSON reader refuses."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnusedName:
    """A file or folder of a session, or a key in a file, that no declared stream uses."""

    file: str
    """Path below the session folder; that of a folder ends in a slash."""
    key: str = ""
    """Key or column; empty if the whole file is not used."""
    meant: str = ""
    """Declared name that the session lacks, which is probably meant."""


Listing = dict[str, "os.DirEntry[str]"]
"""The entries of a folder by name."""


def list_folder(folder: Path) -> Listing | None:
    """List a folder by one request; None if it can't be listed."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name: entry for entry in entries}
    except OSError:
        return None


def list_names(listing: Listing | None, sources: Collection[str]) -> list[str]:
    """List the files and folders in a session folder, and `sources` that are in these folders."""
    names: list[str] = []
    for name, entry in sorted((listing or {}).items()):
        if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():  # noqa: PTH112
            inside = [n for n in sources if os.path.lexists(f"{entry.path}/{n}")]
            names += [f"{name}/{other}" for other in ("", *inside)]
        else:
            names.append(name)
    return [printable(os.fsencode(n).decode("utf-8", "surrogateescape")) for n in names]


def find_unused_files(names: Iterable[str], sources: Collection[str]) -> tuple[UnusedName, ...]:
    """Find the listed names that are neither `sources` nor usual companions of recordings."""
    names = sorted(names)
    if all(name in sources for name in names):
        return ()
    lacking = sorted(set(sources).difference(names))
    filled = Counter(path.partition("/")[0] for path in names if path.partition("/")[2])
    unused: list[UnusedName] = []
    for path in names:
        folder, slash, name = path.rpartition("/")
        if name in sources and slash:
            unused.append(UnusedName(file=path, meant=name))
        elif not slash and name not in sources and not _COMPANION.fullmatch(name):
            unused.append(UnusedName(file=name, meant=_closest_file(name, lacking)))
        elif not name and not _COMPANION.fullmatch(folder) and not filled[folder]:
            unused.append(UnusedName(file=path))
    return tuple(unused)


def find_unused_keys(
    file: str, seen: Iterable[str], used: Collection[str], lacking: Collection[str]
) -> tuple[UnusedName, ...]:
    """Find the keys of a file that are not `used`; `lacking` are declared keys that it lacks."""
    lacking = sorted(lacking)[:_MAX_COMPARED]
    return tuple(
        UnusedName(file=file, key=printable(key[:_MAX_NAME]), meant=closest(key, lacking))
        for key in sorted(set(seen).difference(used))[:_MAX_COMPARED]
    )


def closest(name: str, declared: Iterable[str]) -> str:
    """Return the declared name that a name is probably meant to be; empty if none is similar."""
    likeness = {other: _likeness(name[:_MAX_NAME], other) for other in sorted(declared)}
    best = max(likeness, key=lambda other: likeness[other], default="")
    return best if likeness.get(best, 0.0) >= _LIKENESS else ""


def _closest_file(name: str, sources: Iterable[str]) -> str:
    """Return the declared file that a file is probably meant to be: a similar name, same form."""
    forms = _forms_of(name)
    forms |= {_SOUND} if _VIDEO in forms else set()  # such a file can hold the sound
    stems = {
        source.partition(".")[0]: source
        for source in sources
        if not forms or not forms.isdisjoint(_forms_of(source))
    }
    return stems.get(closest(name.partition(".")[0], stems), "")


def _forms_of(name: str) -> set[int]:
    """Return the forms that the suffixes of a file say."""
    suffixes = {suffix.casefold() for suffix in Path(name).suffixes}
    return {form for form, known in enumerate(_FORMS) if not known.isdisjoint(suffixes)}


def _likeness(one: str, other: str) -> float:
    """Compare two names, 0..1; case, separators and the order of words don't count."""
    first, second = _words(one), _words(other)
    if sorted(first) == sorted(second):
        return 1.0
    # Cameras 1 and 2, or hands l and r, are not the same.
    marks = [re.findall(r"\d+|\b[a-z]\b", " ".join(words)) for words in (first, second)]
    if all(marks) and marks[0] != marks[1]:
        return 0.0
    texts = [re.sub(r"\d", "", "".join(words)) for words in (first, second)]
    short, long = sorted(texts, key=len)
    if len(short) >= _MIN_PREFIX and long.startswith(short):
        return _PREFIX_LIKENESS
    ratio = difflib.SequenceMatcher(a=short, b=long, autojunk=False).ratio()
    is_short = len(short) <= _SHORT and ratio >= _SHORT_LIKENESS
    return max(ratio, _LIKENESS) if is_short else ratio


def _words(name: str) -> list[str]:
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", unicodedata.normalize("NFKC", name))
    return re.findall(r"[^\W_]+", spaced.casefold())


def describe_unused(unused: Sequence[UnusedName]) -> tuple[dict[UnusedName, str], str]:
    """Describe unused names.

    Returns:
        A sentence for each declared name that is probably meant, by the first such name, and one
        sentence that lists the others, empty if there are none.
    """
    meant: dict[tuple[str, str], list[UnusedName]] = {}
    for name in unused:
        if name.meant:
            meant.setdefault((name.file if name.key else "", name.meant), []).append(name)
    sentences = {names[0]: _describe_meant(names) for names in meant.values()}
    others: dict[tuple[str, str], list[str]] = {}
    for name in (name for name in unused if not name.meant):
        noun = "key" if name.key else "folder" if name.file.endswith("/") else "file"
        group = others.setdefault((noun, f" of {name.file}" if name.key else ""), [])
        group.append(name.key or name.file.rstrip("/"))
    listed = "; ".join(_list(noun, names) + where for (noun, where), names in others.items())
    return sentences, f"not used by the recipe: {listed}" if listed else ""


def _describe_meant(names: Sequence[UnusedName]) -> str:
    """Say which declared name is meant, and how to correct it."""
    first, meant = names[0], names[0].meant
    if first.key:
        keys = _list("key", [name.key for name in names])
        fix = "correct the name, or declare a stream of it"
        return f"{first.file}: {keys} not used by the recipe; did you mean {meant}? fix: {fix}"
    files = _list("", [name.file for name in names])
    if "/" in first.file:
        return f"{files}: not read, as it is in a folder of the session; fix: move it out of there"
    suffix, wanted = Path(first.file).suffix.casefold(), Path(meant).suffix.casefold()
    fix = f"rename it to {meant}"
    if first.file.casefold().startswith(f"{meant}.".casefold()):
        fix = f"rename or unpack it to {meant}"
    elif suffix and suffix != wanted:
        is_text = suffix in LINE_SUFFIXES
        fix = f"{'write one JSON object per line into' if is_text else 'convert it to'} {meant}"
        if suffix not in {".json", ".ndjson", ".txt"}:
            fix += f", or write `file: {first.file}` for the stream in the recipe"
    return f"{files}: not used by the recipe; did you mean {meant}? fix: {fix}"


def _list(noun: str, names: Sequence[str]) -> str:
    """List the first names, and the number of the others."""
    listed = ", ".join(names[:_MAX_LISTED])
    if len(names) > _MAX_LISTED:
        listed += f" and {len(names) - _MAX_LISTED} more"
    return f"{noun}{'s' if noun and len(names) > 1 else ''} {listed}".strip()
