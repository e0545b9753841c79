"""How files are read: what several commands share; see settings.py."""

from __future__ import annotations

from pydantic import Field

from langmill.common.setting import Count, Settings


class DataSettings(Settings):
    """How files become documents and token shards."""

    holdout: float = Field(
        0.02, ge=0, lt=1,
        description="share of the documents kept out of training for evaluation, chosen by a hash of "
        "their text, so that equal texts never stand on both sides (0 to below 1)",
    )  # fmt: skip
    text_field: str = Field("text", min_length=1, description="the field or column that holds a row's text")
    section_bytes: Count = Field(
        16384, ge=256,
        description="plain-text files longer than this many bytes are cut at blank lines into documents",
    )  # fmt: skip
    shard_tokens: Count = Field(64_000_000, ge=1, description="tokens in one shard file, at most")
