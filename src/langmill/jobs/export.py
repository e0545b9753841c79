"""`langmill export`: a model as the file or folder that other tools take, read back and compared before it is there."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from langmill.apps import sentence
from langmill.common.errors import DataError, ModelError, UsageError
from langmill.common.files import atomic_write, claimed
from langmill.common.metrics import Report
from langmill.common.settings import ExportSettings
from langmill.families.folder import Model, load, save
from langmill.families.gguf import load_gguf
from langmill.families.gguf_pack import FLOATS, form, half_steps
from langmill.families.gguf_write import architecture, differing, save_gguf
from langmill.families.gguf_write_tokenizer import adds_bos, notes
from langmill.families.hub import resolve
from langmill.families.modelfile import modelfile
from langmill.families.peft import is_adapter, load_adapted, merge
from langmill.jobs.prepared import prepared
from langmill.model.config import ModelConfig
from langmill.model.layers import Int4Embedding, Int8Embedding
from langmill.model.replace import replace
from langmill.text.chat import chat_ids
from langmill.text.tokenizer import Tokenizer

# What a file is read back with: scripts with and without spaces and marks, numbers, code, spaces at both ends.
TEXTS = (
    "The river is long. And 12,345 boats (3.14 %) went by: isn't it?",
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。",
    "مرحبا بالعالم، هذا نص قصير.",
    "नमस्ते दुनिया",
    "안녕하세요 세계, Grüße aus Köln — ça va ?",
    "def f(x):\n\treturn {'a': x**2}  # 🙂👩‍👩‍👧\r\n\n",
    "  two spaces before, three behind   ",
    "</s><|im_end|><|endoftext|>[INST] spelt by a user",
)
CHAT = ({"role": "user", "content": "What is the capital of France? 法国的首都是哪里？"},)
TOKENS = 32  # of each text, at most
CLOSE = 2e-3  # of the logits' own spread: the same weights in the same places differ by rounding alone


def run(settings: ExportSettings, *, quiet: bool = False) -> Report:
    """Write the file or folder, read it back, compare ids and logits, and say so; what does not agree is removed.

    Raises UsageError for an --out or a type that does not fit, ModelError where the format cannot hold the model.
    """
    inputs = [settings.model, settings.base]
    if settings.to == "hf":
        if settings.head_type or settings.type not in (None, *FLOATS):
            raise UsageError(
                f"--to hf writes plain weights: --type is one of {', '.join(FLOATS)}, and no --head-type"
            )
        with claimed(settings.out, force=settings.force, inputs=inputs):
            return _hf(settings)
    _check_file(settings.out, settings.force, inputs)
    return _gguf(settings)


def _load(settings: ExportSettings) -> tuple[Model, Tokenizer | None]:
    """The model, an adapter worked into it."""
    source: Path = resolve(settings.model)
    if not is_adapter(source):
        if settings.base is not None:
            raise UsageError(f"{settings.model} is no adapter: --base is for those")
        return load(
            source, keep=settings.to == "gguf" and settings.type is None
        )  # 4 bits go out as they came
    model, tokenizer = load_adapted(source, settings.base, torch.float32, "cpu")
    merge(model)
    return model.eval(), tokenizer


def _check_file(out: Path, force: bool, inputs: list[str | None]) -> None:
    """Raise where `out` is no name for a file, or is taken."""
    if out.suffix != ".gguf" or out.is_dir():
        raise UsageError(f"--to gguf writes a file: give --out a name that ends in .gguf, not {out}")
    for path in (out, out.with_suffix(".Modelfile")):
        if path.exists() and not force:
            raise UsageError(f"{path} exists already: choose another --out, or replace it with --force")
        if path.exists() and any(given and Path(given).exists() and path.samefile(given) for given in inputs):
            raise UsageError(f"--force would replace {path}, which this reads: choose another --out")


def _gguf(settings: ExportSettings) -> Report:
    model, tokenizer = _load(settings)
    out, length = settings.out, model.config.length
    architecture(model)  # what has no place in a file is refused before anything is computed
    rows, rounded = _rows(model, tokenizer), any(form(layer) for layer in model.modules())
    before = [] if rounded else _logits(model, rows)
    fresh = out.with_name(f".{out.stem}.new.gguf")
    try:
        differences = _differences(model, tokenizer)
        name = Path(settings.model).stem
        found = save_gguf(model, tokenizer, fresh, settings.type, settings.head_type, name, settle=True)
        if changed := differing(model, fresh, found):
            raise ModelError(f"{out}: tensor {changed} does not read back as it was written: nothing is kept")
        plain(model)  # the fast products of rounded layers are rounded themselves
        written = _logits(model, rows)
        del model  # one of them is in memory at a time
        again, its = load_gguf(fresh)
        same = _same_ids(tokenizer, its, out)
        _same_logits(written, _logits(again, rows), out)
        words = modelfile(out.name, tokenizer, length, tokenizer is not None and adds_bos(tokenizer))
        fresh.replace(out)
    finally:
        fresh.unlink(missing_ok=True)
    atomic_write(out.with_suffix(".Modelfile"), words)
    kinds = Counter(piece.kind for piece in found)
    lost = _lost(before, written) if before else {}
    text = [
        f"{out}: {len(found)} tensors, {out.stat().st_size / 1e6:,.1f} MB: "
        + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()),
        f"read back: {same} texts have the same ids, every tensor its numbers, the logits agree",
    ]
    if lost:
        text.append(
            f"against the weights before: {lost['same_likeliest']:.1%} of {sum(map(len, before))} positions have the "
            f"same likeliest token, divergence {lost['divergence']:.2g} nats"
        )
    text += [
        *(f"note: {words}" for words in differences),
        f"next: ollama create NAME -f {out.with_suffix('.Modelfile')}",
    ]
    counts = {"tensors": len(found), **kinds, "bytes": out.stat().st_size, "texts_checked": same}
    return Report(out, counts, lost, "\n".join(text), {"notes": differences})


def _hf(settings: ExportSettings) -> Report:
    model, tokenizer = _load(settings)
    out, kind = settings.out, settings.type or "F32"
    plain(model)
    model.to(FLOATS[kind])
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise ModelError(f"{name} holds numbers that are not finite in {kind}: choose --type BF16 or F32")
    rows, count = _rows(model, tokenizer), len(model.state_dict())
    dtype = str(FLOATS[kind]).removeprefix("torch.")
    seen = {"prepared": prepared([], settings.model)}
    lineage = {"made_by": "langmill export", "model": settings.model, "dtype": dtype, "data": seen}
    save(model, tokenizer, out, lineage=lineage)
    sentence.copy(sentence.folder_of(settings.model, settings.base), out)
    written = _logits(model.float(), rows)
    del model
    again, its = load(out)
    same = _same_ids(tokenizer, its, out)
    _same_logits(written, _logits(again, rows), out)
    text = f"{out}: {count} tensors, {dtype}\nread back: {same} texts have the same ids, the logits agree"
    return Report(out, {"tensors": count, "texts_checked": same}, {}, text)


def plain(model: Model) -> None:
    """Put plain layers in the places of rounded ones, with the weights that these make."""

    def made(name: str, layer: Any) -> nn.Module:
        weight = nn.Parameter(layer.weight.detach().clone())
        if isinstance(layer, Int8Embedding | Int4Embedding):
            return nn.Embedding(weight.shape[0], weight.shape[1], _weight=weight)
        own = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        own.weight, own.bias = weight, layer.bias
        return own.train(layer.training)

    replace(model, lambda name, layer: form(layer) is not None, made)


def _rows(model: Model, tokenizer: Tokenizer | None) -> list[list[int]]:
    """The ids that logits are compared on."""
    most = min(TOKENS, model.config.length)
    if tokenizer is None:
        return [[id % model.config.vocab for id in range(most)]]
    chat = _chat(tokenizer)
    return [ids[:most] for ids in (*map(tokenizer.prompt_ids, TEXTS), *([chat] if chat else []))]


def _chat(tokenizer: Tokenizer) -> list[int] | None:
    """The ids of a question; None where there is no template, or one that wants more than a question."""
    try:
        return chat_ids(tokenizer, CHAT) if tokenizer.chat_template else None
    except DataError:
        return None


@torch.inference_mode()
def _logits(model: Model, rows: list[list[int]]) -> list[Tensor]:
    """What a model makes of each row, one a row, float32: (T, V), or whatever its head gives."""
    config = model.config
    if isinstance(config, ModelConfig) and config.encoder is not None and config.decoder is not None:
        return [model(torch.tensor([row]), encoder_tokens=torch.tensor([row]))[0].float() for row in rows]
    return [model(torch.tensor([row]))[0].float() for row in rows]


def _same_ids(ours: Tokenizer | None, theirs: Tokenizer | None, out: Path) -> int:
    """How many texts were compared. ModelError where a text, a chat or a token that ends one is another there."""
    if ours is None or theirs is None:
        if ours is not theirs:
            raise ModelError(f"{out}: the tokenizer does not come back: nothing is kept")
        return 0
    for text in TEXTS:
        ids = ours.encode(text)
        begun = ours.prompt_ids(text) if adds_bos(ours) == ours.specials.add_bos else theirs.prompt_ids(text)
        same = ids == theirs.encode(text) and begun == theirs.prompt_ids(text)
        if not same or ours.decode(ids) != theirs.decode(ids):
            raise ModelError(f"{out}: {text!r} has other ids when read back: nothing is kept")
    missing = ours.stop_ids - theirs.stop_ids
    if missing or (ours.eos_id not in (None, theirs.eos_id)) or ours.chat_template != theirs.chat_template:
        raise ModelError(
            f"{out}: the chat template or what ends a text is lost ({sorted(missing)}): nothing is kept"
        )
    asked = _chat(ours)
    if asked != _chat(theirs):
        raise ModelError(f"{out}: a chat has other ids when read back: nothing is kept")
    return len(TEXTS) + (asked is not None)


def _same_logits(written: list[Tensor], read: list[Tensor], out: Path) -> None:
    """ModelError where a model that was read back does not compute what the one that was written does."""
    for ours, theirs in zip(written, read, strict=True):
        spread = (ours - ours.mean()).square().mean().sqrt()
        apart = (ours - theirs).square().mean().sqrt()
        if not apart <= CLOSE * spread + 1e-6:  # not a number is no agreement
            raise ModelError(
                f"{out}: read back, its logits are {apart:.3g} apart where they spread by {spread:.3g}: nothing is kept"
            )


def _lost(before: list[Tensor], written: list[Tensor]) -> dict[str, Any]:
    """What the type costs: how many positions have the same likeliest token, and the mean divergence from before."""
    ours, theirs = torch.cat(before), torch.cat(written)
    logs_TV, others_TV = ours.log_softmax(-1), theirs.log_softmax(-1)
    divergence = (logs_TV.exp() * (logs_TV - others_TV)).sum(-1).mean().clamp(min=0).item()
    same = (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()
    return {"same_likeliest": round(same, 4), "divergence": divergence}


def _differences(model: Model, tokenizer: Tokenizer | None) -> list[str]:
    """What is otherwise in the file or in llama.cpp, in words."""
    found = notes(tokenizer) if tokenizer is not None else []
    config = model.config
    window = config.main.window[0] if isinstance(config, ModelConfig) and config.main.window else None
    if window is not None and window < config.length:
        found.append(f"llama.cpp lets every token see all before it, this model the last {window}")
    eights: list[Any] = [layer for layer in model.modules() if form(layer) == "Q8_0"]
    if changed := sum(not torch.equal(half_steps(layer).float(), layer.steps.cpu()) for layer in eights):
        found.append(f"the steps of {changed} layers in 8 bits were rounded to float16, by 0.05 % at most")
    return found
