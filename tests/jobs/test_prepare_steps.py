"""The steps as settings choose them: what is wrong with a setting is told before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from langmill.common.errors import UsageError
from langmill.common.settings import PrepareSettings
from langmill.data.tidy import _detector
from langmill.jobs.prepare_steps import LANGUAGES, recipe


@pytest.mark.parametrize(
    ("given", "said"),
    [("xx", "There are af als am"), ("EN", "did you mean en[?]"), ("zh-Hans", "did you mean zh[?]"),
     ("english", "did you mean en[?]"), ("deu", "did you mean de[?]")],
)  # fmt: skip
def test_a_language_that_no_document_is_in_is_refused_at_once(tmp_path: Path, given: str, said: str) -> None:
    settings = PrepareSettings(source=["raw"], out=tmp_path / "out", language={"keep": ["en", given]})
    with pytest.raises(UsageError, match=f"language.keep: '{given}' is no language.*{said}"):
        recipe(settings, tmp_path / "out.run")


def test_all_that_the_detector_says_can_be_kept(tmp_path: Path) -> None:
    said = {found["lang"] for found in _detector().detect("hello world", k=1000)}
    assert len(said) > 150 and said < LANGUAGES and len(LANGUAGES) == 177
    keep = PrepareSettings(source=["raw"], out=tmp_path / "out", language={"keep": sorted(LANGUAGES)})
    assert len(recipe(keep, tmp_path / "out.run").steps) == 3
