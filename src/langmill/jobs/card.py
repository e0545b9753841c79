"""What travels with a model: lineage.json for programs and README.md, the model card, for people.

Both describe the training text by counts and hashes and hold none of it; of paths only the last name is kept.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch

from langmill import __version__
from langmill.common.settings import Settings
from langmill.jobs.prepared import prepared
from langmill.jobs.report import bytes_shown, count_shown
from langmill.model.config import Config, LSTMConfig
from langmill.model.count import parameters


@dataclass(frozen=True)
class Text:
    """The training text by its numbers. `manifest`: SHA-256 over the hashes of all documents, in order. `prepared`: the
    clean sets that it was read from, where they are known since the run began."""

    documents: int
    held_out: int
    tokens: int
    bytes: int
    manifest: str
    tokenizer: str
    prepared: Sequence[str] = ()


def lineage(settings: Settings, text: Text, parent: str | None, results: Mapping[str, Any]) -> dict[str, Any]:
    """Where a model came from: data, parent, settings, code and what was measured."""
    given = [
        p for n in ("path", "text", "data") for p in (getattr(settings, n, None) or []) if isinstance(p, str)
    ]
    made = sorted({*text.prepared, *prepared(given, parent)})
    values = settings.model_dump(mode="json")
    for name in ("path", "text", "out", "from_model", "data", "model", "template"):
        match values.get(name):  # data and model are groups of settings in some commands
            case str(path):
                values[name] = _last(path)
            case [*paths]:
                values[name] = [_last(path) for path in paths]
    return {
        "data": {
            "manifest_sha256": text.manifest,
            "documents": text.documents,
            "held_out_documents": text.held_out,
            "tokens": text.tokens,
            "bytes": text.bytes,
            "tokenizer_sha256": text.tokenizer,
            "prepared": made,
        },
        "parent": parent and {"name": _last(parent), "sha256": fingerprint(parent)},
        "settings": values,
        "code": {
            "langmill": __version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        "results": dict(results),
    }


def fingerprint(model: str) -> str | None:
    """SHA-256 of a local model's weights file, or of the names and hashes of several; None for a hub id."""
    from langmill.common.files import sha256

    path = Path(model)
    if path.is_file():
        return sha256(path)
    weights = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    if len(weights) == 1:
        return sha256(weights[0])
    import hashlib

    joined = "".join(f"{file.name} {sha256(file)}\n" for file in weights)
    return hashlib.sha256(joined.encode()).hexdigest() if weights else None


def card(name: str, config: Config, text: Text, parent: str | None, results: Mapping[str, Any]) -> str:
    """README.md: what the model is, how to use it, what it was trained on and how well it predicts text."""
    recurrent = isinstance(config, LSTMConfig)
    count = count_shown(parameters(config))
    origin = (
        f"It continues the training of `{_last(parent)}`."
        if parent
        else "It was trained from random weights."
    )
    score = results.get("bits_per_byte")
    scored = "" if score is None else (
        f"It needs {score:.3f} bits for each byte of the {text.held_out} documents that were kept out of training"
        f"{_within(results.get('bits_per_byte_interval'))}.\n"
    )  # fmt: skip
    other = "" if recurrent else (
        "\nWith transformers:\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n```\n'
    )  # fmt: skip
    library = "langmill" if recurrent else "transformers"
    return (
        f"---\nlibrary_name: {library}\npipeline_tag: text-generation\ntags:\n- langmill\n---\n# {name}\n\n"
        f"A language model with {count} parameters ({shape(config)}), made with Langmill {__version__}. {origin}\n\n"
        f'## Use\n\n```\nlangmill generate {name} "Once upon a time"\n```\n{other}\n'
        f"## Training text\n\n{text.documents:,} documents, {text.tokens:,} tokens, {bytes_shown(text.bytes)}. "
        f"This folder holds none of it; `lineage.json` holds its hash, the settings and the versions.\n\n"
        f"## Evaluation\n\n{scored or 'No document was held out.'}\n"
        "## Limits\n\nThe model continues text as it has seen it: what it says can be wrong, and it can repeat "
        "passages of its training text, private ones included. Nobody has checked it for bias or safety.\n"
    )


def shape(config: Config) -> str:
    """The shape in a few words."""
    if isinstance(config, LSTMConfig):
        return f"LSTM, {config.layers} layers, width {config.hidden}, vocabulary {config.vocab:,}"
    d = config.main
    return f"Transformer, {d.layers} layers, width {d.dim}, {d.heads} heads, vocabulary {config.vocab:,}"


def _within(interval: Any) -> str:
    return f" (95 % interval {interval[0]:.3f} to {interval[1]:.3f})" if interval else ""


def _last(path: str) -> str:
    return PurePath(path).name or path
