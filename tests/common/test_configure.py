from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from langmill.common.configure import Key, configure, keys, resolve, save_settings
from langmill.common.errors import SettingsError
from langmill.common.settings import (
    GenerateSettings,
    PretrainSettings,
    Settings,
    TokenizerTrainSettings,
    parse_count,
)


def message(*overrides: str, cls: type[Settings] = PretrainSettings, config: Path | None = None) -> str:
    with pytest.raises(SettingsError) as error:
        configure(cls, config, ["path=a", "out=b", *overrides] if cls is PretrainSettings else overrides)
    return str(error.value)


def values(key: Key) -> st.SearchStrategy[Any]:
    plain = st.characters(codec="utf-8", exclude_characters="[\r")
    words = st.text(plain, min_size=1).filter(
        lambda word: word.strip().lower() not in ("none", "null", "~", "")
    )
    kinds: dict[Any, st.SearchStrategy[Any]] = {
        int: st.integers(300, 10**6),
        float: st.floats(0.01, 0.99),
        bool: st.booleans(),
        Path: st.just(Path("some") / "where"),
        str: words,
        None: st.none(),
    }
    if key.is_list:
        return st.lists(words, min_size=1, max_size=3)
    return st.one_of(*(kinds[kind] if kind in kinds else st.just(kind) for kind in key.kinds))


@given(st.data())
def test_any_settings_survive_the_command_line_and_the_file(
    tmp_path_factory: Any, data: st.DataObject
) -> None:
    chosen = {key: data.draw(values(key), label=key.name) for key in keys(PretrainSettings)}
    overrides = [
        f"{key.name}={part}"
        for key, value in chosen.items()
        for part in (value if isinstance(value, list) else [value])
    ]
    settings = configure(PretrainSettings, None, overrides)
    for key, value in chosen.items():
        found: Any = settings
        for part in (*key.path[:-1], key.field):
            found = getattr(found, part)
        assert found == value
    path = tmp_path_factory.mktemp("settings") / "settings.yaml"
    save_settings(settings, path)
    assert configure(PretrainSettings, path) == settings


def test_names(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "path: a\nout: b\ntrain: {max-steps: 2K}\nbeta1: 0.5\ndata.holdout: 0.3\n"
    )
    found = configure(
        PretrainSettings, tmp_path / "c.yaml", ["train.max-steps=9", "size=10"], seed=3, out=None
    )
    assert (found.train.max_steps, found.train.beta1, found.data.holdout) == (9, 0.5, 0.3)
    assert (found.model.size, found.seed, found.out) == ("10", 3, Path("b"))
    assert (
        resolve(PretrainSettings, "from").field
        == resolve(PretrainSettings, "from-model").field
        == "from_model"
    )
    assert (
        resolve(PretrainSettings, "path").name == "path"
        and resolve(TokenizerTrainSettings, "kind").name == "kind"
    )


def test_lists_and_nothing() -> None:
    found = configure(
        GenerateSettings, None, ["model=m", "stop=a, b", "stop=[c, d]", "system=none", "prompt=[x"]
    )
    assert found.stop == ["a, b", "[c, d]"] and found.system is None and found.prompt == ["[x"]


def test_an_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    assert "'train.max_stepz': did you mean 'train.max_steps'?" in message("train.max_stepz=4")
    assert "did you mean 'train.learning_rate'?" in message("learnin-rate=4")
    assert "'train'" in message("train=4")
    assert "see --help" in message("qqqqqq=1")
    (tmp_path / "c.yaml").write_text("train: {sede: 1}\n")
    assert "c.yaml: there is no setting 'train.sede'" in message(config=tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("max_steps=abc", "'abc' is not a count"),
        ("max_steps=0", "greater than or equal to 1"),
        ("beta1=1", "should be less than 1"),
        ("learning_rate=.nan", "finite"),
        ("schedule=linear", "'cosine', 'wsd' or 'constant'"),
        ("compile=maybe", "'auto' or should be a valid boolean"),
        ("dtype", "not KEY=VALUE"),
    ],
)
def test_a_bad_value_says_what_is_right(override: str, said: str) -> None:
    text = message(override)
    assert said in text and override.partition("=")[0] in text


def test_what_is_missing_is_named_with_its_purpose() -> None:
    assert "model is missing (model folder, .gguf file or hub id)" in message(cls=GenerateSettings)


@pytest.mark.parametrize("text", ["a: [", "- 1", "train: 3", "1: 2", "\x00"])
def test_a_broken_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    assert "c.yaml" in message(config=tmp_path / "c.yaml")
    assert "does not exist" in message(config=tmp_path / "d.yaml")


def test_counts() -> None:
    assert [parse_count(text) for text in ("4096", "10M", "1.5B", "64MiB", "2_000", "3 kb")] == [
        4096, 10**7, 1_500_000_000, 64 << 20, 2000, 3000,
    ]  # fmt: skip
    for bad in ("", "M", "-1", "1e6", "10MM", "ten"):
        with pytest.raises(ValueError, match="is not a count"):
            parse_count(bad)
