"""What the commands that use a model can be told; see settings.py."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from langmill.common.setting import Device, Seed, Settings, Threads, UseDtype


class WriteSettings(Settings):
    """How a model writes: what `generate` and `chat` share."""

    model: str = Field(description="model folder, .gguf file or hub id")
    adapter: Path | None = Field(None, description="folder of a PEFT adapter to put onto the model")
    system: str | None = Field(None, description="the system message that begins a chat")
    max_new_tokens: int = Field(128, ge=1, description="tokens to write at most, for each prompt")
    temperature: float = Field(0.0, ge=0, description="0: always the likeliest token; 1: as the model says")
    top_k: int = Field(0, ge=0, description="sample among the k likeliest tokens; 0: all")
    top_p: float = Field(1.0, gt=0, le=1, description="sample among the likeliest that make up this share")
    min_p: float = Field(0.0, ge=0, le=1, description="drop tokens below this share of the likeliest one's")
    repetition_penalty: float = Field(1.0, gt=0, description="above 1: tokens seen become less likely")
    stop: list[str] = Field(default_factory=list, description="end before this text appears (repeatable)")
    kv_bits: Literal[32, 8] = Field(
        32, description="of the keys and values that are remembered; 8: a quarter of the memory, on a CPU"
    )
    lookup: int | None = Field(
        None, ge=0, le=64, description="guess so many tokens ahead from what was read and written: faster where texts "
        "repeat, the same result; none: 4 for a single text on a CPU",
    )  # fmt: skip
    draft: str | None = Field(
        None, description="a smaller model with the same tokenizer to guess ahead; the same result"
    )
    seed: Seed = 0
    dtype: UseDtype = "auto"
    device: Device = "auto"
    threads: Threads = None


class GenerateSettings(WriteSettings):
    """`langmill generate`: a model goes on from a prompt."""

    prompt: list[str] = Field(default_factory=list, description="texts to go on from; none: standard input")
    file: Path | None = Field(
        None, description='prompts: JSONL rows {"prompt"}, {"text"} or {"messages"}, else one a line'
    )
    chat: bool = Field(False, description="render each prompt as one user turn through the chat template")
    suffix: str | None = Field(
        None,
        description="what follows the gap that is to be filled (models pretrained with objective=infill or blanks)",
    )
    top: int | None = Field(
        None,
        ge=1,
        description="likeliest tokens to list for each [MASK] (masked models such as BERT); none: 5",
    )
    json_schema: str | None = Field(
        None, description="write JSON that this schema allows: a file, or the schema itself; {}: any JSON"
    )
    regex: str | None = Field(None, description="write a text that all of this pattern matches")
    choice: list[str] = Field(default_factory=list, description="write one of these texts (repeatable)")
    grammar: Path | None = Field(
        None, description="write a text of the grammar in this file, in Lark's notation"
    )


class ChatSettings(WriteSettings):
    """`langmill chat`: a conversation in the terminal."""

    max_new_tokens: int = Field(512, ge=1, description="tokens of one answer, at most")
    temperature: float = Field(0.7, ge=0, description="0: always the likeliest token; 1: as the model says")
    top_p: float = Field(0.95, gt=0, le=1, description="sample among the likeliest that make up this share")
    context: int | None = Field(
        None, ge=64, description="tokens that are remembered at most; none: the model's window, within 1 GiB"
    )
    overflow: Literal["oldest", "stop"] = Field(
        "oldest", description="a chat beyond the model's window: leave the oldest turns out, or refuse"
    )


class ReadSettings(Settings):
    """How a model reads texts: what `classify`, `tag`, `answer`, `translate`, `embed` and `similar` share."""

    model: str = Field(description="model folder or hub id, taught the task")
    text: list[str] = Field(default_factory=list, description="the texts; none: --file or standard input")
    file: Path | None = Field(
        None,
        description='texts: JSONL rows with "text" (see --field), .csv, .tsv or .parquet, else one a line',
    )
    field: str | None = Field(
        None,
        min_length=1,
        description="the field or column of the file that holds the text; none: text (answer: context before text; "
        "translate: text before source)",
    )
    out: Path | None = Field(None, description="file to write the results to; none: standard output, JSONL")
    force: bool = Field(False, description="replace an existing --out")
    long_texts: Literal["error", "truncate", "window"] = Field(
        "window",
        description="texts longer than the model reads: refuse, keep the beginning, or overlapping windows; where "
        "it is not given, classify, tag and answer do as finetune taught the model",
    )
    overlap: int = Field(64, ge=0, description="tokens that a window shares with the one before")
    batch_size: int = Field(
        64, ge=1, description="texts that are read together; results come after each batch"
    )
    dtype: UseDtype = "auto"
    device: Device = "auto"
    threads: Threads = None


class ClassifySettings(ReadSettings):
    """`langmill classify`: which label each text has, and how sure the model is."""

    threshold: float = Field(
        0.5, gt=0, lt=1, description="several labels a text: those at least so likely are said"
    )
    labels: list[str] = Field(
        default_factory=list,
        description="zero-shot: choose among these labels, by a decoder's likelihood or an encoder's similarity",
    )
    template: str = Field(
        "{text}\n\nTopic: {label}",
        description="zero-shot: how a decoder sees a text, of which it cuts off what does not fit, with a label; an "
        "encoder compares text and label",
    )
    calibrate: bool = Field(
        True, description="zero-shot by a decoder: take away how likely a label is without any text"
    )
    examples: Path | None = Field(
        None,
        description="few-shot by a decoder: JSONL rows with text and label to show before each text, never itself",
    )
    shots: int = Field(4, ge=1, description="how many of them, evenly over the labels")
    seed: Seed = 0


class TagSettings(ReadSettings):
    """`langmill tag`: the spans of a text that a model was taught to find."""


class AnswerSettings(ReadSettings):
    """`langmill answer`: where a text answers a question, and how sure the model is that it does."""

    question: str | None = Field(None, description="the question to ask of every text; none: in the rows")
    n_best: int = Field(1, ge=1, description="answers to list for each question")
    max_answer: int = Field(30, ge=1, description="tokens of an answer, at most")
    threshold: float | None = Field(
        None,
        description="how much likelier no answer must be to be said; none: what did best on questions held out from "
        "finetune, or 0",
    )


class TranslateSettings(ReadSettings):
    """`langmill translate`: beam search, sentence by sentence, line breaks kept."""

    beams: int = Field(
        5,
        ge=1,
        description="translations that are followed at once; 1: greedy. Where this, length_penalty or max_new_tokens "
        "is not given, the model's generation_config.json counts before the default",
    )
    n_best: int = Field(1, ge=1, description="translations to list for each text, at most beams")
    length_penalty: float = Field(
        1.0, description="above 0 longer translations are preferred, below 0 shorter"
    )
    max_new_tokens: int = Field(256, ge=1, description="tokens of a sentence's translation, at most")
    plain: bool = Field(False, description="print the translations alone, not JSONL")


class EmbedSettings(ReadSettings):
    """`langmill embed`: a vector for each text."""

    pool: Literal["auto", "mean", "first", "last"] = Field(
        "auto", description="how a text's tokens become one vector; auto: as the model's folder says, or mean"
    )
    normalise: bool = Field(True, description="vectors of length 1")
    dims: int | None = Field(None, ge=1, description="keep so many numbers of each (for Matryoshka models)")
    bits: Literal[8] | None = Field(
        None,
        description="8: weights rounded to 8 bits as the model is read, which is faster on a CPU with a C++ compiler "
        "and changes vectors a little; none: as the model's folder holds them",
    )


class SimilarSettings(EmbedSettings):
    """`langmill similar`: the texts that are nearest to a query."""

    query: str = Field(description="what to look for")
    top: int = Field(5, ge=1, description="how many to show")
