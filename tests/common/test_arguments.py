from __future__ import annotations

from pathlib import Path

import pytest

from langmill.common.arguments import place, sort_words
from langmill.common.errors import SettingsError, UsageError
from langmill.common.settings import GenerateSettings, PretrainSettings


def test_words_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a=b.txt").touch()
    words = "x --out y --max-steps=3 --resume --no-force a=b.txt train.beta1=0.5 --tied false z --from -5 -".split()
    free, overrides = sort_words(PretrainSettings, words)
    assert free == ["x", "a=b.txt", "z", "-"]
    assert overrides == [
        "out=y", "train.max_steps=3", "resume=true", "force=false", "train.beta1=0.5", "model.tied=false", "from=-5",
    ]  # fmt: skip
    texts = ["x=1", "temperature=0.5"]
    assert sort_words(GenerateSettings, texts, texts=True) == (["x=1"], ["temperature=0.5"])
    assert sort_words(GenerateSettings, [*texts, "--seed=3"], pairs=False) == (texts, ["seed=3"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max-stepz", "3"], "did you mean 'train.max_steps'"),
        (["train.max_stepz=3"], "did you mean 'train.max_steps'"),
        (["--jsn"], "did you mean 'json'"),
        (["-x"], "no option '-x'"),
        (["--out"], "--out needs a value: model folder"),
        (["--out", "--resume"], "--out needs a value"),
        (["--no-out"], "no setting 'no-out'"),
    ],
)
def test_what_is_not_understood_is_an_error(words: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        sort_words(PretrainSettings, words, ("json",))


def test_arguments_find_their_places() -> None:
    assert place(GenerateSettings, ("model", "prompt"), ["m", "a", "b"]) == {
        "model": "m",
        "prompt": ["a", "b"],
    }
    assert place(GenerateSettings, ("model", "prompt"), []) == {}
    with pytest.raises(UsageError, match="no place for 'b'"):
        place(GenerateSettings, ("model",), ["m", "b"])
    with pytest.raises(SettingsError):
        place(GenerateSettings, ("nothing",), ["m"])
