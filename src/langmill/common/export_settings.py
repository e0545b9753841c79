"""What `langmill export` can be told; see settings.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from langmill.common.setting import Settings


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


Type = Annotated[Literal["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"], BeforeValidator(_upper)]


class ExportSettings(Settings):
    """`langmill export`: a model as the file or folder that other tools take."""

    model: str = Field(description="model or adapter folder, .gguf file or hub id")
    out: Path = Field(description="gguf: the file to write, X.gguf; hf: the folder")
    to: Literal["gguf", "hf"] = Field(
        "gguf", description="gguf: for llama.cpp and Ollama; hf: a Hugging Face folder of plain weights"
    )
    type: Type | None = Field(
        None,
        description="number type of the matrices; none: as they are quantised, else the float of two bytes that holds "
        "them exactly (F16 where none does; hf: F32)",
    )
    head_type: Type | None = Field(
        None,
        description="gguf: number type of the embedding and the output layer; none: the others', Q8_0 beside four bits",
    )
    base: str | None = Field(
        None, description="the model that an adapter belongs to; none: as the adapter names it"
    )
    force: bool = Field(False, description="replace an existing --out")
