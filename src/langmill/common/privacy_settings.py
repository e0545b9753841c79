"""What anonymisation can be told; see settings.py."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from langmill.common.setting import Settings


class RedactionSettings(Settings):
    """What is found, and what takes its place."""

    policy: Literal["mask", "label", "pseudonym", "remove"] = Field(
        "mask",
        description="mask: a star for each letter and digit; label: [EMAIL]; pseudonym: another value of its kind, the "
        "same for the same value under one key; remove: nothing",
    )
    types: list[str] = Field(
        default_factory=list,
        description="what to find, such as email phone card iban ip secret (repeatable); none: all that is known",
    )
    names: str | None = Field(
        None,
        description="find persons and addresses too: the folder of a model taught by finetune --task tag, or presidio "
        "(extra: privacy) with a spaCy pipeline that is installed, as presidio:PIPELINE; none: do not",
    )
    key_file: Path | None = Field(None, description="pseudonym: file that holds the secret key")
    key_env: str | None = Field(
        None, min_length=1, description="pseudonym: environment variable that holds the secret key"
    )
    make_key: bool = Field(
        False, description="pseudonym: write a new key to a key_file that is not there yet"
    )


class RedactSettings(Settings):
    """`langmill privacy redact`: files without personal details and secrets."""

    file: list[Path] = Field(
        min_length=1,
        description="files: .jsonl .ndjson .json .ipynb .csv .tsv .parquet, others as text in UTF-8; mail, pages, PDF "
        "and packed files are for `langmill data prepare`, which takes their text out",
    )
    out: Path | None = Field(
        None, description="file to write, or folder for several; none: standard output, for one file of text"
    )
    field: list[str] = Field(
        default_factory=list,
        description="of rows, look in these fields or columns alone (repeatable); none: in every text, however deep",
    )
    force: bool = Field(False, description="replace an existing --out")
    redact: RedactionSettings = RedactionSettings()
