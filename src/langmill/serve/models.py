"""The models that are served: loaded once, by name, each with what it can do and the engine that does it."""

from __future__ import annotations

import asyncio
import difflib
import hashlib
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from langmill import __version__
from langmill.apps.sentence import Finishing, Recipe, recipe
from langmill.common.errors import ModelError, UsageError
from langmill.common.settings import ServeSettings
from langmill.families import peft
from langmill.families.folder import Model
from langmill.families.hub import resolve
from langmill.infer.adapters import Adapter, read
from langmill.infer.engine import Engine
from langmill.infer.native_embed import NativeEmbedder, eight_bits, is_rounded, why_not
from langmill.infer.ready import ready
from langmill.infer.runner import Embedder, TorchEmbedder
from langmill.infer.running import engine_for, places, why_torch
from langmill.infer.service import Service
from langmill.model.config import Config, ModelConfig
from langmill.serve.errors import NoSuchModel, stopping
from langmill.serve.heap import give_back
from langmill.serve.line import Line
from langmill.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from langmill.infer.constrain import Grammars

LOG = logging.getLogger("langmill.serve")
READING = 8  # of the longest bodies that wait to be made ids
SAMPLE = 1 << 20  # bytes at both ends of a weights file that its fingerprint looks at
DOES = {  # each thing that a model may do, in words, and what to do about one that does not
    "write": "write text: serve a decoder such as Llama or GPT-2",
    "chat": "chat, since it has no chat template: use /v1/completions, or serve a model that was tuned on chats",
    "embed": "make vectors: serve an encoder such as BERT",
    "classify": "classify: serve one that was taught it by langmill finetune --task classify",
    "choose": "classify by labels that it was not taught: serve an encoder such as BERT, or a decoder with --zero-shot",
    "tag": "tag: serve one that was taught it by langmill finetune --task tag",
    "answer": "answer questions from texts: serve one that was taught it by langmill finetune --task answer",
    "translate": "translate: serve an encoder-decoder such as Marian, BART or T5",
}


@dataclass(eq=False)
class Loaded:
    """A model under its name.

    does: of DOES. window: tokens of a prompt and its answer, or of a text. fingerprint: of its files and this version.
    service: over its engine; None for what the functions of apps/ run, one at a time in a thread, behind `line`.
    reading: before long texts are made ids, in characters. closing: it takes no more requests. parent: of an adapter
    that is kept beside another model, that one, whose engine knows it as `adapter`; `service` is None then. made: how
    a text becomes a vector, of a model that makes them.
    """

    name: str
    folder: str
    model: Model
    tokenizer: Tokenizer
    does: frozenset[str]
    window: int
    created: int
    fingerprint: str
    line: Line
    reading: Line
    service: Service | None = None
    closing: bool = False
    parent: Loaded | None = None
    adapter: int = 0
    made: Recipe | None = None
    _grammars: Grammars | None = None
    _making: threading.Lock = field(default_factory=threading.Lock)

    @property
    def engine(self) -> Service:
        """The service, of a model that is known to have one; an adapter's is its parent's."""
        service = self.service if self.parent is None else self.parent.service
        assert service is not None
        return service

    @contextmanager
    def open(self) -> Iterator[None]:
        """Around what it is asked for. Refused with 503 where it closes, before or meanwhile."""
        if self.closing:
            raise stopping()
        try:
            yield
        except UsageError:  # as a closed engine has it too
            if self.closing:
                raise stopping() from None
            raise

    def accounting(self) -> dict[str, int]:
        """What goes on and waits; see `Engine.accounting`. Of an adapter it counts as its parent's."""
        own = self.line.accounting()
        engine = {} if self.service is None else self.service.accounting()
        return {name: count + engine.get(name, 0) for name, count in own.items()}

    def grammars(self) -> Grammars:
        """What makes constraints for its texts; the first call takes a second. MissingExtra without llguidance."""
        from langmill.infer.constrain import Grammars

        with self._making:
            if self._grammars is None:
                self._grammars = Grammars(self.tokenizer, self.model.config.vocab)
            return self._grammars


@dataclass(frozen=True)
class Models:
    """All models that are served, the first one first."""

    all: tuple[Loaded, ...]

    def names(self) -> list[Loaded]:
        """The models, in the order of the command line."""
        return list(self.all)

    def named(self, name: str) -> Loaded:
        """NoSuchModel, with the names that there are, where there is none of this one."""
        known = {loaded.name: loaded for loaded in self.all}
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            there = f"did you mean '{near[0]}'?" if near else f"this server has {', '.join(known)}"
            raise NoSuchModel(f"there is no model '{name[:200]}' here: {there}")
        return known[name]

    def find(self, name: str, does: str) -> Loaded:
        """The model of this name, which does this; NoSuchModel, or UsageError where it does not."""
        loaded = self.named(name)
        if does not in loaded.does:
            needed = "write" if does == "chat" and "write" not in loaded.does else does
            raise UsageError(f"the model {name} does not {DOES[needed]}")
        return loaded

    async def close(self, drain: bool) -> None:
        """End all engines: when what goes on has ended, or after cancelling it."""
        for loaded in self.all:
            loaded.closing = True
        services = [loaded.service for loaded in self.all if loaded.service is not None]
        await asyncio.gather(*(service.close(drain) for service in services))


def load_models(settings: ServeSettings) -> Models:
    """Every model and adapter of the settings, ready. UsageError for names that do not fit, ModelError for models."""
    if not settings.model:
        raise UsageError("name at least one model to serve: a folder, a .gguf file or a hub id")
    if settings.name and len(settings.name) != len(settings.model):
        raise UsageError(
            f"there are {len(settings.name)} names for {len(settings.model)} models: give one for each model, or none"
        )
    names = settings.name or [name_of(where) for where in settings.model]
    adapters = [_adapted(text, names, settings.model) for text in settings.adapter]
    called = [*names, *(name for name, _, _ in adapters)]
    if twice := [name for name in called if called.count(name) > 1]:
        raise UsageError(f"two models would be called {twice[0]}: give each a name of its own with --name")
    found: dict[str, Loaded] = {}
    for number, (name, where) in enumerate(zip(names, settings.model, strict=True)):
        theirs = {adapter: folder for adapter, model, folder in adapters if model == number}
        found |= {loaded.name: loaded for loaded in load_one(name, where, theirs, settings)}
        give_back()
    return Models(tuple(found[name] for name in called))


def name_of(where: str) -> str:
    """What a model is called where nothing else is said: the last part of its folder, file or hub id."""
    path = Path(where.partition("@")[0]) if not Path(where).exists() else Path(where).resolve()
    return path.stem if path.suffix == ".gguf" else path.name


def _adapted(text: str, names: Sequence[str], models: Sequence[str]) -> tuple[str, int, Path]:
    """The name, number of the model and folder of an adapter: of several models the one that is named behind an @, or
    else the one that the adapter names."""
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise UsageError(f"--adapter takes NAME=DIR or NAME=DIR@MODEL, not '{text}'")
    path, chosen = Path(folder), ""
    if "@" in folder and not path.exists():
        folder, _, chosen = folder.rpartition("@")
        path = Path(folder)
    if not peft.is_adapter(path):
        raise UsageError(f"--adapter {text}: {folder} holds no {peft.CONFIG}")
    if chosen:
        if chosen not in names:
            raise UsageError(f"--adapter {text}: no model is served as {chosen}: there is {', '.join(names)}")
        return name, names.index(chosen), path
    if len(models) == 1:
        return name, 0, path
    base = peft.base_of(path)
    for number, where in enumerate(models):
        if where == base or _same(where, base):
            return name, number, path
    raise UsageError(
        f"--adapter {text} was made for {base}, which is not among the models that are served: name the one that it "
        f"is for, as {name}={folder}@{names[0]}"
    )


def _same(one: str, other: str) -> bool:
    """Whether both are one folder or file here; nothing is fetched to find out."""
    one_path, other_path = Path(one).expanduser(), Path(other).expanduser()
    return one_path.exists() and other_path.exists() and one_path.samefile(other_path)


def load_one(name: str, where: str, adapters: Mapping[str, Path], settings: ServeSettings) -> list[Loaded]:
    """One model, with its engine where it has one, and its adapters: folders by name."""
    model, tokenizer = ready(where, settings.dtype, settings.device, settings.threads)
    whole = why_whole(model, tokenizer, settings) if adapters else None
    kept = {} if whole else {one: read(folder, model, tokenizer) for one, folder in adapters.items()}
    made = [_loaded(name, where, None, model, tokenizer, settings, kept)]
    for number, (one, adapter) in enumerate(kept.items(), 1):
        LOG.info("%s is an adapter of %.1f MB beside %s", one, adapter.bytes / 1e6, name)
        made.append(_beside(made[0], one, number, adapter.tokenizer, adapters[one], settings))
    for one, folder in adapters.items() if whole else ():
        LOG.warning("%s takes the memory of a model of its own, merged with its adapter: %s", one, whole)
        model, tokenizer = ready(where, settings.dtype, settings.device, settings.threads, folder)
        made.append(_loaded(one, where, folder, model, tokenizer, settings, {}))
        give_back()
    return made


def why_whole(model: Model, tokenizer: Tokenizer, settings: ServeSettings) -> str | None:
    """Why a model's adapters cannot be kept beside its weights, for people to read; None where they can."""
    if "write" not in abilities(model.config, tokenizer, settings.zero_shot):
        return "only a model that writes text keeps adapters beside it"
    if settings.zero_shot:
        return "--zero-shot reads texts with the weights of each model"
    reason = why_torch(model)
    return reason and f"only the C++ pass keeps adapters beside a model, and {reason}"


def _loaded(
    name: str, where: str, adapter: Path | None, model: Model, tokenizer: Tokenizer, settings: ServeSettings,
    beside: Mapping[str, Adapter],
) -> Loaded:  # fmt: skip
    """A model, `adapter` in it, with its engine where it has one; that knows the adapters `beside` by their places."""
    does = abilities(model.config, tokenizer, settings.zero_shot)
    if not does:
        raise ModelError(f"{where} does nothing that can be served: it neither writes nor reads texts")
    service, window, made = None, model.config.length, None
    if "write" in does:
        length = places(model, settings.context, settings.slots, settings.kv_bits)
        engine = engine_for(
            model, tokenizer, slots=settings.slots, length=length, kv_bits=settings.kv_bits,
            release=not settings.zero_shot, queue_tokens=settings.queue_tokens,
        )  # fmt: skip
        assert engine.runner is not None
        for one in beside.values():
            engine.adapt(one)
        service, window = Service(engine), engine.runner.length
    elif "embed" in does:
        made = recipe(where, model, settings.pool)
        embedder = embedder_of(model, tokenizer, made, settings)
        service = Service(Engine(None, tokenizer, embedder=embedder, queue_tokens=settings.queue_tokens))
        window = embedder.length
    return Loaded(
        name, where, model, tokenizer, does, window, int(time.time()), fingerprint(where, adapter),
        *_lines(settings), service, made=made,
    )  # fmt: skip


def _beside(
    parent: Loaded, name: str, number: int, tokenizer: Tokenizer, folder: Path, settings: ServeSettings
) -> Loaded:
    """An adapter that the parent's engine knows by this number."""
    does = abilities(parent.model.config, tokenizer, settings.zero_shot)
    return Loaded(
        name, parent.folder, parent.model, tokenizer, does, parent.window, int(time.time()),
        fingerprint(parent.folder, folder), *_lines(settings), parent=parent, adapter=number,
    )  # fmt: skip


def _lines(settings: ServeSettings) -> tuple[Line, Line]:
    return Line(settings.queue_tokens), Line(READING * settings.max_body_bytes, "characters")


def abilities(config: Config, tokenizer: Tokenizer, zero_shot: bool) -> frozenset[str]:
    """What a model of this shape and tokenizer does, of DOES."""
    if not isinstance(config, ModelConfig) or config.writes:
        extra = {"chat"} if tokenizer.chat_template is not None else set()
        return frozenset({"write"} | extra | ({"choose"} if zero_shot else set()))
    task = "embed" if config.head is None else config.head.task
    if len(config.stacks) > 1 and not config.rereads:
        return frozenset({"translate"} if task == "text" else ())
    if task in ("text", "embed"):
        return frozenset({"embed", "choose"} if len(config.stacks) == 1 else ())
    return frozenset({"tag" if task == "tag" else "answer" if task == "answer" else "classify"})


def embedder_of(model: Model, tokenizer: Tokenizer, made: Recipe, settings: ServeSettings) -> Embedder:
    """What makes a model's vectors of length 1, as `langmill embed` makes them."""
    if settings.bits == 8 or is_rounded(model):
        slow = why_not(model, tokenizer.frame)
        if settings.bits == 8:
            eight_bits(model)
        if slow is None:
            native = NativeEmbedder(model, made.pool, normalise=not made.after, length=made.length)
            return Finishing(native, made)
    return Finishing(TorchEmbedder(model, made.pool, normalise=not made.after), made)


def fingerprint(where: str, adapter: Path | None) -> str:
    """Changes when the model's files or Langmill's version do: sizes, configurations, and both ends of the weights."""
    path = resolve(where)
    folders = [path, *([adapter] if adapter is not None else [])]
    seen = hashlib.sha256(__version__.encode())
    for folder in folders:
        for file in sorted(folder.iterdir()) if folder.is_dir() else [folder]:
            if file.suffix not in (".json", ".jinja", ".safetensors", ".gguf") or not file.is_file():
                continue
            size = file.stat().st_size
            seen.update(f"{file.name}:{size}:".encode())
            with open(file, "rb") as stream:
                seen.update(stream.read(SAMPLE))
                stream.seek(max(size - SAMPLE, 0))
                seen.update(stream.read(SAMPLE))
    return f"fp_{seen.hexdigest()[:12]}_{__version__}"
