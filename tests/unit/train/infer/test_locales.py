"""Sessions with any name are predicted under any locale of the machine."""

from __future__ import annotations

import pytest
from helpers.locales import LOCALES, locale_environment, run_python
from helpers.trained_models import make_checkpoint, make_session


@pytest.mark.parametrize("locale", LOCALES)
def test_a_session_of_any_name_is_predicted_under_another_locale(locale, tmp_path):
    (tmp_path / "locales").mkdir()
    environment = locale_environment(locale, tmp_path / "locales")
    session = make_session(tmp_path / "grün 日本", duration_s=4.0)
    make_checkpoint(tmp_path / "model.pt")
    command = ["-m", "train", "infer", "--checkpoint", tmp_path / "model.pt", "--input", session]
    run_python(*command, "--out", tmp_path / "öut", environment=environment)
    assert list((tmp_path / "öut").rglob("index.html"))
