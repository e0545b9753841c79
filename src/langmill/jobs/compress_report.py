"""What came of rounding a model: the page, report.json, the card, and the last lines on the terminal."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from langmill.common.metrics import Report
from langmill.common.settings import CompressSettings
from langmill.compress.quantize import EMBEDDING, HEAD, Changed, Plan
from langmill.families.gguf_file import rounded
from langmill.families.hub import resolve
from langmill.jobs import report as page
from langmill.jobs import results
from langmill.jobs.card import Text as Described
from langmill.jobs.card import lineage, shape
from langmill.jobs.charts import Bar, bar_chart
from langmill.jobs.compress import Measured, Text, summary
from langmill.jobs.heldout import difference
from langmill.jobs.report import (
    Html,
    Page,
    Tile,
    bytes_shown,
    commands,
    folded,
    join,
    ledger,
    machine,
    seconds_shown,
    shown,
    table,
    text,
)  # fmt: skip
from langmill.jobs.results import between, path_shown, three
from langmill.model.transformer import Transformer
from langmill.text.tokenizer import Tokenizer

Figures = Mapping[str, Any]


def write_report(
    settings: CompressSettings, model: Transformer, wanted: Plan, read: Text, layers: Sequence[Changed],
    before: Measured, after: Measured, compared: Figures, folder: Path, seconds: float,
) -> Report:  # fmt: skip
    """Write the page and report.json."""
    found: dict[str, Any] = {
        "bytes_before": weights_bytes(resolve(settings.model)),
        "bytes": weights_bytes(settings.out),
        **summary(layers),
        **compared,
    }
    if before.scores is not None and after.scores is not None:
        more, interval = difference(before.scores, after.scores, settings.seed)
        found |= {
            "bits_per_byte_difference": more,
            "bits_per_byte_difference_interval": interval and list(interval),
        }
    counts = {
        "layers": len(layers),
        "left": len(wanted.left),
        "calibration_tokens": sum(int(batch["tokens_BT"].numel()) for batch in read.batches),
        "held_out_documents": len(read.held),
    }
    made = _page(settings, model, wanted, read, layers, found, counts, seconds)
    extra = {
        "calibration": read.source,
        "layers": [dataclasses.asdict(layer) for layer in layers],
        "left": dict(wanted.left),
        "ledger": read.ledger.as_dict(),
    }
    words = "\n".join(_words(settings, wanted, read, found, counts, folder))
    return results.publish(settings.out, folder, made, counts, found, words, extra, seconds)


def weights_bytes(path: Path) -> int:
    """The size of a model's weights, a file or the safetensors files of a folder."""
    files = [path] if path.is_file() else path.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)


def _page(
    settings: CompressSettings, model: Transformer, wanted: Plan, read: Text, layers: Sequence[Changed],
    found: Figures, counts: Mapping[str, int], seconds: float,
) -> Page:  # fmt: skip
    tiles = [
        Tile("size", bytes_shown(found["bytes"]), f"before {bytes_shown(found['bytes_before'])}"),
        Tile("bits a weight", f"{found['bits_per_weight']:.2f}", "of the rounded layers, steps included"),
        Tile(
            "bits per byte", _three(found["bits_per_byte"]), f"before {_three(found['bits_per_byte_before'])}"
        ),
        Tile(
            "speed", _speed(found["tokens_per_second"]), f"before {_speed(found['tokens_per_second_before'])}"
        ),
    ]
    sections: list[tuple[str, Html]] = [
        ("What it costs", _cost(read, found)),
        ("The layers", _layers(layers, wanted)),
        ("The text", join(text(f"The layers were rounded {read.source}."), ledger(read.ledger.as_dict()))),
        ("How to go on", commands(next_commands(settings, model))),
        ("Settings", folded("All settings as resolved", page.settings(settings.model_dump(mode="json")))),
    ]
    kicker = f"langmill compress, {settings.bits} bits · {time.strftime('%d %B %Y')} · {machine()}"
    words = f"{settings.model} ({shape(model.config)}): {counts['layers']} layers rounded in {seconds_shown(seconds)}."
    return Page(
        f"{settings.out.name}: fewer bits, and what they change",
        kicker,
        words,
        tiles,
        notices(wanted),
        sections,
    )


def notices(wanted: Plan) -> list[str]:
    """What the user should know first."""
    if not wanted.left:
        return []
    return [f"{len(wanted.left)} layers stay as they are: {left_shown(wanted)}."]


def left_shown(wanted: Plan, most: int = 3) -> str:
    """The layers that stay, by reason, some of them by name."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in wanted.left.items():
        by_reason.setdefault(reason, []).append(name)
    return "; ".join(
        f"{', '.join(names[:most])}{f' and {len(names) - most} more' if len(names) > most else ''} ({reason})"
        for reason, names in by_reason.items()
    )


def _cost(read: Text, found: Figures) -> Html:
    where = "text kept out of the calibration" if not read.same else "the calibration text, for want of other"
    parts: list[Html] = []
    if found["bits_per_byte"] is not None:
        bars = [
            Bar("before", found["bits_per_byte_before"], None, "s1"),
            Bar("after", found["bits_per_byte"], None, "s0"),
        ]
        parts.append(
            Html(bar_chart("Bits per byte: lower is better", bars, "bits per byte of held-out text"))
        )
        interval = found.get("bits_per_byte_difference_interval")
        rows = [
            (name.replace("_", " "), three(found[f"{name}_before"]), three(found[name]))
            for name in ("bits_per_byte", "perplexity", "loss")
        ]
        more = f"{found['bits_per_byte_difference']:+.4f}"
        caption = (
            f"{len(read.held):,} documents. The difference in bits per byte is {more}"
            f"{f' (95 % interval {between(interval)})' if interval else ''}."
        )
        parts.append(table(caption, ("", "before", "after"), rows, 2))
    if found["states_error"] is not None:
        parts.append(
            text(
                f"The last states move by {found['states_error']:.2%} of their length, on {where}.", note=True
            )
        )
    return (
        join(*parts)
        if parts
        else text("There was no text to compare the models on: give some by --data or --on.")
    )


def _layers(layers: Sequence[Changed], wanted: Plan) -> Html:
    head = (
        "",
        "rounded",
        "bits",
        "outputs × inputs",
        "weights moved by",
        "outputs moved by",
        "bytes before",
        "bytes",
    )
    rows = [
        (
            layer.name, layer.method, layer.bits, f"{layer.shape[0]:,} × {layer.shape[1]:,}",
            f"{layer.weight_error:.2%}", "–" if layer.output_error is None else f"{layer.output_error:.2%}",
            layer.bytes_before, layer.bytes,
        )
        for layer in layers
    ]  # fmt: skip
    caption = "Lengths of the errors as shares of the original's; outputs on the calibration text"
    parts = [folded(f"All {len(layers)} layers", table(caption, head, rows, 6)), _by_kind(layers)]
    if wanted.left:
        parts.append(table("Left as they are", ("layer", "reason"), wanted.left.items()))
    return join(*reversed(parts))


def _by_kind(layers: Iterable[Changed]) -> Html:
    """One row for all layers of a name."""
    kinds: dict[str, list[Changed]] = {}
    for layer in layers:
        kinds.setdefault(".".join(layer.name.split(".")[-2:]), []).append(layer)
    rows = []
    for kind, own in kinds.items():
        found = summary(own)
        outputs = found["output_error"]
        cells = (f"{found['weight_error']:.2%}", "–" if outputs is None else f"{outputs:.2%}")
        rows.append((kind, len(own), own[0].bits, *cells, sum(layer.bytes for layer in own)))
    head = ("layers", "number", "bits", "weights moved by", "outputs moved by", "bytes")
    return table("Means over all layers of a name, by their weights", head, rows, 5)


def next_commands(settings: CompressSettings, model: Transformer) -> list[tuple[str, str]]:
    """What to do with the result now."""
    out = path_shown(settings.out)
    return [
        ("Use it as the model before:", _use(model, out)),
        (
            "Compare it on other text:",
            f"langmill evaluate {out} --on FILE --against {path_shown(settings.model)}",
        ),
        (
            "For llama.cpp and Ollama, without another rounding:",
            f"langmill export {out} --to gguf --out {out}.gguf",
        ),
    ]


def _twice(model: str) -> list[str]:
    """What is to be said of a file whose matrices are rounded already."""
    path = resolve(model)
    kinds = rounded(path) if path.suffix == ".gguf" else []
    told = f"{path.name} is rounded already ({', '.join(kinds)}), and now once more: better take the model before that"
    return [told] if kinds else []


def _words(
    settings: CompressSettings, wanted: Plan, read: Text, found: Figures, counts: Mapping[str, int], folder: Path
) -> list[str]:  # fmt: skip
    lines = [
        f"{settings.out}: {counts['layers']} layers in {settings.bits} bits, rounded {read.source}",
        f"size: {bytes_shown(found['bytes'])}, before {bytes_shown(found['bytes_before'])} "
        f"({found['bits_per_weight']:.2f} bits a weight)",
    ]
    if found["bits_per_byte"] is not None:
        interval = found.get("bits_per_byte_difference_interval")
        spread = f", 95 % interval {interval[0]:+.4f} to {interval[1]:+.4f}" if interval else ""
        lines.append(
            f"bits per byte: {three(found['bits_per_byte'])}, before {three(found['bits_per_byte_before'])} "
            f"({found['bits_per_byte_difference']:+.4f}{spread}); perplexity {shown(found['perplexity'])}, before "
            f"{shown(found['perplexity_before'])} ({counts['held_out_documents']} documents)"
        )
    else:
        writes = found["tokens_per_second"] is not None
        why = "no held-out text: give some by --data or --on" if writes else "this model does not write text"
        lines.append(f"bits per byte: not measured ({why})")
    if found["states_error"] is not None:
        lines.append(
            f"last states moved by {found['states_error']:.2%}"
            + (", on the calibration text" if read.same else "")
        )
    if found["tokens_per_second"] is not None:
        lines.append(
            f"writes {_speed(found['tokens_per_second'])} tokens, before {_speed(found['tokens_per_second_before'])}"
        )
    lines += [f"{len(wanted.left)} layers stay as they are: {left_shown(wanted)}"] if wanted.left else []
    lines += _twice(settings.model)
    if dropped := read.ledger.dropped():
        lines.append(
            "left out: " + ", ".join(f"{count.documents} {reason}" for reason, count in dropped.items())
        )
    return [*lines, f"report: {folder / 'report.html'}"]


def write_preview(settings: CompressSettings, model: Transformer, wanted: Plan, source: str) -> Report:
    """What --dry-run prints."""
    kinds = Counter((rounding.bits, name in (EMBEDDING, HEAD)) for name, rounding in wanted.roundings.items())
    weights = {name: layer.weight for name in wanted.roundings if (layer := _layer(model, name))}
    bits = sum(w.numel() * (4.5 if wanted.roundings[name].bits == 4 else 8) for name, w in weights.items())
    rest = sum(weight.nbytes for weight in model.parameters()) - sum(w.nbytes for w in weights.values())
    lines = [f"{settings.model} ({shape(model.config)}), rounded {source}"]
    for (width, outside), count in sorted(kinds.items()):
        lines.append(f"  {count} {'embedding or output' if outside else 'linear'} layers in {width} bits")
    lines.append(f"  about {bytes_shown(bits / 8 + rest)} in memory, {bytes_shown(rest)} of them not rounded")
    lines += [f"  {len(wanted.left)} layers stay as they are: {left_shown(wanted)}"] if wanted.left else []
    lines += [f"  {line}" for line in _twice(settings.model)]
    counts = {"layers": len(wanted.roundings), "left": len(wanted.left)}
    extra = {
        "layers": {name: rounding.bits for name, rounding in wanted.roundings.items()},
        "left": dict(wanted.left),
        "calibration": source,
        "settings": settings.model_dump(mode="json"),
    }
    return Report(
        counts=counts, figures={"bytes": math.ceil(bits / 8) + rest}, text="\n".join(lines), extra=extra
    )


def _layer(model: Transformer, name: str) -> Any:
    return model.get_submodule(name)


def origin(
    settings: CompressSettings, read: Text, tokenizer: Tokenizer | None, compared: Figures
) -> dict[str, Any]:
    """lineage.json."""
    kept, tokens = read.ledger.total("read"), sum(int(batch["tokens_BT"].numel()) for batch in read.batches)
    digest = hashlib.sha256()
    for batch in read.batches:
        digest.update(batch["tokens_BT"].cpu().numpy().tobytes())
    own = "" if tokenizer is None else tokenizer.fingerprint
    described = Described(kept.documents, len(read.held), tokens, kept.bytes, digest.hexdigest(), own)
    values = lineage(settings, described, settings.model, compared)
    for name in ("data", "on"):
        values["settings"][name] = [Path(path).name for path in getattr(settings, name)]
    return values


def card(settings: CompressSettings, model: Transformer, wanted: Plan, compared: Figures) -> str:
    """README.md: what the model is made of, how to use it, and what was lost."""
    name, base = settings.out.name, Path(settings.model).name
    now, was = compared["bits_per_byte"], compared["bits_per_byte_before"]
    scored = "It was not compared on text." if now is None else (
        f"On held-out text it needs {now:.3f} bits for each byte, and `{base}` {was:.3f}."
    )  # fmt: skip
    head = f"library_name: transformers\nbase_model: {base}\ntags:\n- langmill\n- compressed-tensors"
    return (
        f"---\n{head}\n---\n# {name}\n\n`{base}` ({shape(model.config)}) with {len(wanted.roundings)} layers in "
        f"{settings.bits} bits.\n\n## Use\n\n```\n{_use(model, name)}\n```\n\nOther tools read it with the package "
        f"`compressed-tensors`. For llama.cpp: `langmill export {name} --to gguf --out {name}.gguf`.\n\n"
        f"## Evaluation\n\n{scored}\n\n## Limits\n\nThose of `{base}`, and what fewer bits cost.\n"
    )


def _use(model: Transformer, out: str) -> str:
    """The command that uses such a model."""
    head, both = model.config.head, len(model.config.stacks) > 1
    task: str = "embed" if head is None else head.task
    if task == "text":
        task = "translate" if both else "text" if model.config.writes else "embed"
    if task == "text":
        return f'langmill generate {out} "Once upon a time"'
    command = {"multilabel": "classify", "regress": "classify"}.get(task, task)
    return f"langmill {command} {out} TEXT"


def _three(value: float | None) -> str:
    return "–" if value is None else three(value)


def _speed(value: float | None) -> str:
    return "–" if value is None else f"{value:,.1f}/s"
