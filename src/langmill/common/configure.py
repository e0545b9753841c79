"""Settings from a YAML file, overrides and named values; an unknown key is an error that names the nearest."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic_core import PydanticUndefined

from langmill.common.errors import SettingsError
from langmill.common.files import atomic_write
from langmill.common.settings import Settings

S = TypeVar("S", bound=Settings)
_NOTHING = ("none", "null", "~", "")


@dataclass(frozen=True)
class Key:
    """One setting: its place (`train`, `max_steps`), its type and what `--help` says about it.

    `field` is the attribute in Python, which differs from the last part of the place for `from` alone.
    """

    path: tuple[str, ...]
    field: str
    type: Any
    default: Any
    required: bool
    description: str

    @property
    def name(self) -> str:
        return ".".join(self.path)

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The types a value may have, unions and aliases opened: (int, None), ("auto", bool)."""
        return tuple(_kinds(self.type))

    @property
    def is_flag(self) -> bool:
        return set(self.kinds) <= {bool, None}

    @property
    def is_list(self) -> bool:
        return any(get_origin(kind) is list for kind in self.kinds)


def _kinds(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is list or not get_args(annotation):
        yield None if annotation is type(None) else annotation
    elif get_origin(annotation) is Literal:
        yield from get_args(annotation)
    else:  # a union; of Annotated pydantic has kept the type alone
        for part in get_args(annotation):
            if isinstance(part, type) or get_args(part):
                yield from _kinds(part)


def keys(cls: type[Settings]) -> list[Key]:
    """Every setting of a class and of the groups inside it, in the order of their definition."""
    found = []
    for name, info in cls.model_fields.items():
        group = info.annotation
        if isinstance(group, type) and issubclass(group, Settings):
            found += [replace(key, path=(name, *key.path)) for key in keys(group)]
            continue
        default = info.get_default(call_default_factory=True, validated_data={})
        default = None if default is PydanticUndefined else default
        path = (info.alias or name,)
        found.append(Key(path, name, info.annotation, default, info.is_required(), info.description or ""))
    return found


def resolve(cls: type[Settings], name: str, others: Sequence[str] = ()) -> Key:
    """The setting that a name means: a dotted path, or a last part that only one has; "-" equals "_".

    Raises SettingsError with the nearest name where there is none (`others` are names to think of besides),
    and with all where there are several.
    """
    plain = (
        name.replace("-", "_").removesuffix("_model")
        if name.endswith("from_model")
        else name.replace("-", "_")
    )
    known = keys(cls)
    exact = [key for key in known if key.name == plain]
    matches = exact or [key for key in known if plain in (key.path[-1], key.field)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise SettingsError(
            f"'{name}' could be {' or '.join(key.name for key in matches)}: write one of them"
        )
    words = {word: word for word in others} | {
        word: key.name for key in known for word in (key.path[-1], key.name)
    }
    near = difflib.get_close_matches(plain, words, n=1, cutoff=0.5)
    hint = f": did you mean '{words[near[0]]}'?" if near else " (see --help for all)"
    raise SettingsError(f"there is no setting '{name}'{hint}")


def configure(cls: type[S], config: Path | None = None, overrides: Sequence[str] = (), **explicit: Any) -> S:
    """Make the settings of a run: the YAML file, then `key=value` overrides, then named values (None: not given).

    A value is read as a YAML scalar, but as plain text where the setting is text, or a list of texts. A list setting
    collects repeated overrides. Raises SettingsError for an unknown key or a value out of range.
    """
    values: dict[str, Any] = {}
    if config is not None:
        for key, value in _flatten(cls, _read_yaml(config), (), config):
            _put(values, key, value)
    repeated: dict[str, list[Any]] = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise SettingsError(f"'{override}' is not KEY=VALUE")
        key = resolve(cls, name.strip())
        value = _parse(key, text)
        if key.is_list:
            repeated.setdefault(key.name, []).extend(value if isinstance(value, list) else [value])
            value = repeated[key.name]
        _put(values, key, value)
    for name, value in explicit.items():
        if value is not None:
            _put(values, resolve(cls, name), value)
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise SettingsError(_sentences(cls, error)) from None


def save_settings(settings: Settings, path: Path) -> None:
    """Write settings as YAML that `configure` reads back to an equal object."""
    atomic_write(path, as_yaml(settings))


def as_yaml(settings: Settings) -> str:
    value = settings.model_dump(mode="json", by_alias=True)
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
    if yaml.safe_load(text) != value:  # PyYAML loses some rare line separators unless they are escaped
        text = yaml.safe_dump(value, sort_keys=False)
    return text


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        value = yaml.safe_load(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"the settings file {path} does not exist") from None
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise SettingsError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise SettingsError(f"{path} must hold settings as 'key: value' lines")
    return value


def _flatten(
    cls: type[Settings], values: Mapping[str, Any], prefix: tuple[str, ...], source: Path
) -> Iterator[tuple[Key, Any]]:
    groups = {key.path[0] for key in keys(cls) if len(key.path) > 1}
    for name, value in values.items():
        if not prefix and str(name).replace("-", "_") in groups:
            if not isinstance(value, dict):
                raise SettingsError(
                    f"{source}: '{name}' is a group of settings, such as '{name}: {{key: value}}'"
                )
            yield from _flatten(cls, value, (str(name).replace("-", "_"),), source)
            continue
        try:
            yield resolve(cls, ".".join((*prefix, str(name)))), value
        except SettingsError as error:
            raise SettingsError(f"{source}: {error}") from None


def _parse(key: Key, text: str) -> Any:
    if None in key.kinds and text.strip().lower() in _NOTHING:
        return None
    texts = (str, Path, list[str])
    if any(kind in texts for kind in key.kinds):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _put(values: dict[str, Any], key: Key, value: Any) -> None:
    if key.is_list and not isinstance(value, list):
        value = [value]
    for group in key.path[:-1]:
        values = values.setdefault(group, {})
    values[key.path[-1]] = value


def _sentences(cls: type[Settings], error: ValidationError) -> str:
    """Pydantic's findings in words: the setting, what was given, what is right, what it is for."""
    known = {key.path: key for key in keys(cls)}
    found: dict[str, list[str]] = {}
    about: dict[str, str] = {}
    for problem in error.errors():
        place = tuple(str(part) for part in problem["loc"])
        key = next((known[place[:end]] for end in range(len(place), 0, -1) if place[:end] in known), None)
        name = key.name if key else ".".join(place)
        about[name] = f" ({key.description})" if key else ""
        message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
        if name not in found:
            message = "is missing" if problem["type"] == "missing" else f"is {problem['input']!r}: {message}"
        found.setdefault(name, []).append(message)
    return "; ".join(f"{name} {' or '.join(messages)}{about[name]}" for name, messages in found.items())
