"""What `langmill compress` can be told; see settings.py."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from langmill.common.setting import Device, Seed, Settings, Threads


class CompressSettings(Settings):
    """`langmill compress`: a model in 8 or 4 bits."""

    model: str = Field(description="model folder, .gguf file or hub id")
    bits: Literal[8, 4] = Field(
        8, description="of a weight: 8 changes next to nothing, 4 halves the size once more at some cost"
    )
    out: Path = Field(description="model folder to write; its private run folder is OUT.run")
    data: list[str] = Field(
        default_factory=list,
        description="text files or folders of them, or translation rows, to calibrate by; none: what the model writes "
        "itself, and for a model with an encoder no calibration",
    )
    on: list[str] = Field(
        default_factory=list, description="text to compare both models on; none: the held-out part of data"
    )
    method: Literal["gptq", "nearest"] | None = Field(
        None,
        description="gptq: weights make good for each other's rounding, measured on text; nearest: each alone, no "
        "text needed; none: gptq where there is text",
    )
    symmetric: bool = Field(
        True,
        description="4 bits: zero in the middle of each group; false: each group has its own, a little finer",
    )
    head_bits: Literal[4, 8, 16] = Field(
        8, description="bits of embedding and output layer; 16: they stay as they are"
    )
    portable: bool = Field(
        True,
        description="store an embedding of 8 bits as float16, as transformers needs it; false: as codes, half the size",
    )
    samples: int = Field(64, ge=1, description="windows of text to calibrate by, at most")
    max_length: int | None = Field(
        None, ge=8, description="tokens of a window; none: what the model reads, at most 512"
    )
    damping: float = Field(
        0.05, gt=0, le=1, description="gptq: how little the calibration text is trusted; more for little text"
    )
    holdout: float = Field(
        0.1, ge=0, lt=1, description="share of data kept out of calibration for the comparison, by a hash"
    )
    text_field: str = Field("text", min_length=1, description="the field or column that holds a row's text")
    force: bool = Field(False, description="replace an existing --out")
    seed: Seed = 0
    device: Device = "auto"
    threads: Threads = None
