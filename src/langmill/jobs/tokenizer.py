"""`langmill tokenizer train` and `langmill tokenizer inspect`."""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

from langmill.common.errors import ModelError, UsageError
from langmill.common.files import atomic_write, claimed
from langmill.common.metrics import Report
from langmill.common.settings import TokenizerInspectSettings, TokenizerSettings, TokenizerTrainSettings
from langmill.data.readers import check_paths
from langmill.families import gguf_file, gguf_tokenizer, vocabulary
from langmill.families.hub import resolve
from langmill.jobs import corpus
from langmill.jobs.report import shown
from langmill.text.tokenizer import Tokenizer
from langmill.text.training import MARKS

COLOURS = ("black on cyan", "black on yellow")  # in turn; every terminal that has colours has these
SPECIAL = "white on red"


def find(where: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json, a folder, a .gguf file or a hub id; ModelError where there is none."""
    if Path(where).is_file() and Path(where).suffix == ".json":
        return Tokenizer.load(where)
    path = resolve(where)
    if path.suffix != ".gguf":
        return vocabulary.tokenizer_of(path) or Tokenizer.load(path)
    found = gguf_tokenizer.build(gguf_file.read(path).metadata, path)
    if found is None:
        raise ModelError(f"{path} holds no tokenizer")
    return found


def train(settings: TokenizerTrainSettings, *, quiet: bool = False) -> Report:
    """Train on a bounded sample of the text and write tokenizer.json with its companions to OUT; where that ends in
    .json, the tokenizer.json alone."""
    check_paths(settings.path)
    alone = settings.out.suffix == ".json"
    if alone and settings.out.exists() and not (settings.force and settings.out.is_file()):
        raise UsageError(f"{settings.out} exists already: choose another --out, or replace it with --force")
    wanted = TokenizerSettings(
        kind=settings.kind, vocab_size=settings.vocab_size, sample_bytes=settings.sample_bytes
    )
    source = corpus.files(settings.path, settings.data)
    marks = [token for mark in dict.fromkeys(settings.marks) for token in MARKS[mark]]
    with contextlib.ExitStack() as stack:
        folder = settings.out
        if alone:
            scratch = tempfile.TemporaryDirectory(prefix="langmill-", ignore_cleanup_errors=True)
            folder = Path(stack.enter_context(scratch)) / "tokenizer"
        else:
            stack.enter_context(claimed(settings.out, force=settings.force, inputs=settings.path))
        tokenizer = corpus.train_tokenizer(source, wanted, folder, quiet, specials=marks)
        if alone:
            atomic_write(settings.out, (folder / "tokenizer.json").read_bytes())
    asked = settings.vocab_size
    short = (
        f" ({asked:,} were asked for: the text gives no more)"
        if asked and asked > tokenizer.vocab_size
        else ""
    )
    return Report(
        settings.out,
        counts={"vocabulary": tokenizer.vocab_size},
        figures={},
        text=f"{settings.out}: {settings.kind}, {tokenizer.vocab_size:,} entries{short}\n"
        f'next: langmill tokenizer inspect {settings.out} "some text"',
        extra={"fingerprint": tokenizer.fingerprint},
    )


def inspect(settings: TokenizerInspectSettings, *, quiet: bool = False) -> Report:
    """Show what a tokenizer holds and, of a text, every token with its id, and bytes per token."""
    tokenizer = find(settings.tokenizer)
    specials = {
        "start": tokenizer.start_id,
        "boundary": tokenizer.boundary_id,
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "pad": tokenizer.pad_id,
    }
    lines = [
        Text(
            f"{settings.tokenizer}: {tokenizer.vocab_size:,} entries, fingerprint {tokenizer.fingerprint[:12]}"
        ),
        Text("  ".join(f"{name} {_named(tokenizer, id)}" for name, id in specials.items())),
        Text(f"stops generation: {', '.join(_named(tokenizer, id) for id in sorted(tokenizer.stop_ids))}"),
        Text("chat template: " + ("yes" if tokenizer.chat_template else "none")),
    ]
    counts: dict[str, int] = {"vocabulary": tokenizer.vocab_size}
    figures: dict[str, float] = {}
    extra: dict[str, object] = {"specials": specials, "fingerprint": tokenizer.fingerprint}
    if settings.text is not None:
        ids = tokenizer.encode(settings.text)
        size = len(settings.text.encode("utf-8"))
        back = tokenizer.decode(ids, skip_specials=False)
        counts |= {"tokens": len(ids), "bytes": size}
        figures["bytes_per_token"] = size / max(1, len(ids))
        extra |= {
            "ids": ids,
            "tokens": [tokenizer.token(id) for id in ids],
            "lossless": back == settings.text,
        }
        lines += [Text(), coloured(tokenizer, ids), Text(" ".join(map(str, ids))), Text()]
        lines.append(
            Text(
                f"{shown(len(ids))} tokens for {shown(size)} bytes: {figures['bytes_per_token']:.2f} bytes a token"
            )
        )
        if back != settings.text:
            lines.append(Text(f"this tokenizer loses something: decoded, the text is {back!r}"))
    return Report(counts=counts, figures=figures, text=_drawn(lines), extra=extra)


def coloured(tokenizer: Tokenizer, ids: list[int]) -> Text:
    """The text of `ids`, each token on a colour of its own; a character of several tokens says how many."""
    found, held, colour = Text(), list[int](), 0
    for index, id in enumerate(ids):
        held.append(id)
        piece = tokenizer.decode(held, skip_specials=False)
        if piece.endswith("\ufffd") and index + 1 < len(ids):  # the rest of the character is still to come
            continue
        style = SPECIAL if id in tokenizer.special_ids else COLOURS[colour % 2]
        count = f"⟨{len(held)}⟩" if len(held) > 1 else ""
        found.append(piece.replace("\n", "⏎\n").replace("\t", "⇥\t") + count, style)
        held, colour = [], colour + 1
    return found


def _named(tokenizer: Tokenizer, id: int | None) -> str:
    return "none" if id is None else f"{tokenizer.token(id)} ({id})"


def _drawn(lines: list[Text]) -> str:
    """The lines as the terminal shows them: with colours where standard output is one that has them."""
    outside = Console()
    inside = Console(
        file=io.StringIO(),
        width=outside.width,
        force_terminal=outside.is_terminal,
        no_color=outside.no_color,
        color_system=outside.color_system if outside.is_terminal else None,  # type: ignore[arg-type]  # a plain str there
    )
    with inside.capture() as capture:
        for line in lines:
            inside.print(line, soft_wrap=True, highlight=False)
    return capture.get()
