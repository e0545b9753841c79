"""What `langmill evaluate` can be told; see settings.py."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from langmill.common.data_settings import DataSettings
from langmill.common.setting import Device, Seed, Settings, Threads, UseDtype


class EvaluateSettings(Settings):
    """`langmill evaluate`: how well a model does on text, questions, labels, translations or in a search, with
    intervals."""

    model: str = Field(description="model folder, .gguf file or hub id")
    on: list[str] = Field(
        min_length=1,
        description="text files, folders of them, or prepared shards; or rows with question and choices, prompt and "
        "answer, text and label, tokens and tags, translation, sentence1, sentence2 and score, or anchor "
        "and positive",
    )
    against: str | None = Field(
        None, description="another model for the same rows: differences with paired intervals, and a verdict"
    )
    task: Literal[
        "text", "choices", "generate", "answer", "classify", "tag", "translate", "sts", "embed", None
    ] = Field(
        None,
        description="what is asked; none: as the fields of the first row say, and answer (where in a context the "
        "answer stands) for a model that was taught it",
    )
    out: Path | None = Field(None, description="file for the results of every row, JSONL")
    force: bool = Field(False, description="replace an existing --out")
    template: str | None = Field(
        None,
        description="the prompt, with a row's fields such as {question} in their places; classify: {text} and {label}; "
        "none: as the row's fields suggest",
    )
    examples: Path | None = Field(
        None, description="rows to take few-shot examples from, other than those asked"
    )
    shots: int = Field(0, ge=0, description="examples before every prompt, chosen by the seed")
    target_delimiter: str | None = Field(
        None,
        description="choices, generate: what stands between a prompt and its answer; none: a space, unless the prompt "
        "ends with white space",
    )
    chat: bool = Field(False, description="generate: render each prompt as one user turn")
    max_new_tokens: int | None = Field(
        None, ge=1, description="tokens of one answer; none: 32, and 256 for a sentence's translation"
    )
    stop: list[str] = Field(
        default_factory=list,
        description="generate: end before this text; none: a line's end, in a chat nothing",
    )
    beams: int = Field(5, ge=1, description="translate: translations that are followed at once; 1: greedy")
    source: str | None = Field(
        None, description="translate: the language to translate from; none: the rows' first"
    )
    target: str | None = Field(
        None, description="translate: the language to translate to; none: the rows' second"
    )
    calibrate: bool = Field(
        True, description="zero-shot classify: take away how likely a label is without any text"
    )
    split: Literal["all", "held_out"] = Field(
        "all", description="held_out: only the documents that training with the same data.holdout kept out"
    )
    max_length: int | None = Field(
        None, ge=2, description="tokens in one window; none: the model's own, at most 1024"
    )
    micro_batch_size: int = Field(
        8, ge=1, description="windows, prompts or texts in one pass; no score depends on it"
    )
    resamples: int = Field(
        1000, ge=1, description="bootstrap resamples over documents or rows for the 95 % intervals"
    )
    seed: Seed = 0
    dtype: UseDtype = "auto"
    device: Device = "auto"
    threads: Threads = None
    data: DataSettings = DataSettings()
