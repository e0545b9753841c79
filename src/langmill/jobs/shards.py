"""`langmill data shards`: documents to memory-mapped token shards, with the tokenizer beside them."""

from __future__ import annotations

from langmill.common.files import claimed
from langmill.common.metrics import Report
from langmill.common.progress import track
from langmill.common.settings import ShardsSettings
from langmill.data.pipeline import Ledger
from langmill.data.readers import check_paths, read
from langmill.data.shards import write_shards
from langmill.jobs.prepared import prepared
from langmill.jobs.report import bytes_shown, shown
from langmill.jobs.tokenizer import find


def run(settings: ShardsSettings, *, quiet: bool = False) -> Report:
    """Read, encode and write; the private OUT.run holds errors.jsonl, with what was set aside and why.

    Shards of a prepared folder name its version, so that `data forget` finds them. OUT can be given to
    `langmill pretrain` any number of times. UsageError where it exists without --force.
    """
    check_paths(settings.path)
    tokenizer = find(settings.tokenizer)
    inputs = [*settings.path, settings.tokenizer]
    with claimed(settings.out, force=settings.force, inputs=inputs) as folder:
        errors = folder / "errors.jsonl"
        ledger = Ledger(errors)
        with track("encoding", unit="B", quiet=quiet) as progress:
            shards = write_shards(
                read(settings.path, settings.data, ledger),
                tokenizer,
                settings.out,
                shard_tokens=settings.data.shard_tokens,
                ledger=ledger,
                on_batch=lambda _, size: progress.advance(size),
                prepared=prepared(settings.path),
            )
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
