"""`langmill data shards`: documents to memory-mapped token shards, with the tokenizer beside them."""

from __future__ import annotations

from langmill.common.files import claimed
from langmill.common.metrics import Report
from langmill.common.settings import ShardsSettings
from langmill.data.readers import check_paths
from langmill.jobs import corpus
from langmill.jobs.report import bytes_shown, shown
from langmill.jobs.tokenizer import find


def run(settings: ShardsSettings, *, quiet: bool = False) -> Report:
    """Read, encode and write; the private OUT.run holds errors.jsonl, with what was set aside and why.

    OUT can be given to `langmill pretrain` any number of times. UsageError where it exists without --force.
    """
    check_paths(settings.path)
    tokenizer = find(settings.tokenizer)
    inputs = [*settings.path, settings.tokenizer]
    with claimed(settings.out, force=settings.force, inputs=inputs) as folder:
        errors = folder / "errors.jsonl"
        source = corpus.files(settings.path, settings.data)
        shards = corpus.make_shards(source, tokenizer, settings.out, settings.data, errors, quiet)
        tokenizer.save(settings.out)
    dropped = {reason: count["documents"] for reason, count in shards.ledger["dropped"].items()}
    lines = [
        f"{settings.out}: {shown(shards.documents)} documents, {shown(shards.tokens)} tokens from "
        f"{bytes_shown(shards.bytes)}, {shards.bytes / shards.tokens:.2f} bytes a token ({shards.manifest['encoder']})",
        *(f"set aside: {shown(count)} x {reason} (see {errors})" for reason, count in dropped.items()),
        f"next: langmill pretrain {settings.out} --out MODEL",
    ]
    return Report(
        settings.out,
        counts={
            "documents": shards.documents,
            "tokens": shards.tokens,
            "bytes": shards.bytes,
            "set_aside": sum(dropped.values()),
        },
        figures={"bytes_per_token": shards.bytes / shards.tokens},
        text="\n".join(lines),
        extra={"ledger": shards.ledger, "encoder": shards.manifest["encoder"]},
    )
