"""Run programs under locales in which Python does not read names of files as UTF-8."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

LOCALES = ("C", "de_DE.ISO-8859-1")


def locale_environment(name: str, folder: Path) -> dict[str, str]:
    """Return the environment of a machine with a locale, compiled into `folder` if need be.

    The test is skipped where that is impossible.
    """
    if shutil.which("localedef") and name != "C":
        language, _, charset = name.partition(".")
        command = ["localedef", "-i", language, "-f", charset, str(folder / name)]
        subprocess.run(command, check=False, capture_output=True)
    own = {"LC_ALL": name, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LOCPATH": str(folder)}
    environment = {**os.environ, **own}
    environment.pop("PYTHONIOENCODING", None)
    code = "import sys; print(sys.getfilesystemencoding())"
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    if result.stdout.strip() == b"utf-8":
        pytest.skip(f"the locale {name} is not installed here")
    return environment


def run_python(*arguments: str | Path, environment: dict[str, str]) -> bytes:
    """Run Python, which has to succeed; return its output."""
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, timeout=300)
    assert result.returncode == 0, result.stderr.decode(errors="replace")
    return result.stdout
