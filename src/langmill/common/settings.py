"""What a run can be told: one frozen class a command, grouped as `data.`, `tokenizer.`, `model.`, `train.`.

Every field's description is what `--help` prints. None always means "chosen for you", and the
description says by what. Counts may be written 64M or 2G (powers of ten), 64MiB (powers of two).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from langmill.common.setting import Count as Count
from langmill.common.setting import Device as Device
from langmill.common.setting import SampleBytes as SampleBytes
from langmill.common.setting import Seed as Seed
from langmill.common.setting import Settings as Settings
from langmill.common.setting import Threads as Threads
from langmill.common.setting import UseDtype as UseDtype
from langmill.common.setting import VocabularySize as VocabularySize
from langmill.common.setting import parse_count as parse_count
from langmill.common.use_settings import AnswerSettings as AnswerSettings
from langmill.common.use_settings import ChatSettings as ChatSettings
from langmill.common.use_settings import ClassifySettings as ClassifySettings
from langmill.common.use_settings import EmbedSettings as EmbedSettings
from langmill.common.use_settings import GenerateSettings as GenerateSettings
from langmill.common.use_settings import ReadSettings as ReadSettings
from langmill.common.use_settings import SimilarSettings as SimilarSettings
from langmill.common.use_settings import TagSettings as TagSettings
from langmill.common.use_settings import TranslateSettings as TranslateSettings
from langmill.common.use_settings import WriteSettings as WriteSettings


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


class TokenizerSettings(Settings):
    """Which tokenizer a run uses: an existing one, or one trained on the run's own text."""

    path: str | None = Field(
        None, description="an existing tokenizer.json, or a folder that holds one; none: train one here"
    )
    kind: Literal["bpe", "wordpiece", "unigram"] = Field(
        "bpe", description="the kind to train; bpe (byte-level) loses nothing and knows every character"
    )
    vocab_size: VocabularySize = None
    sample_bytes: SampleBytes = 64 << 20


class ModelSettings(Settings):
    """The model's shape: one dial, `size`, and an override for each number behind it."""

    family: Literal["llama", "gpt2", "qwen3", "lstm"] = Field(
        "llama", description="architecture; lstm is the recurrent baseline, which other tools cannot load"
    )
    size: str = Field(
        "small", description="tiny, small, base, ... (see `langmill plan`), or a parameter count such as 10M"
    )
    layers: int | None = Field(None, ge=1, description="blocks in the stack; none: from size")
    dim: int | None = Field(None, ge=1, description="width of the residual stream; none: from size")
    heads: int | None = Field(None, ge=1, description="attention heads; none: from size")
    kv_heads: int | None = Field(
        None, ge=1, description="key and value heads, a divisor of heads; none: from size"
    )
    hidden: int | None = Field(None, ge=1, description="width inside the MLP; none: from size")
    tied: bool | None = Field(
        None, description="share the embedding with the output layer (saves vocabulary x dim parameters); "
        "none: from size",
    )  # fmt: skip


class TrainSettings(Settings):
    """The training loop: how much, how fast, with which optimizer, and what it keeps."""

    objective: Literal["causal"] = Field("causal", description="causal: predict the next token")
    max_length: int | None = Field(None, ge=2, description="tokens in one row; none: from size")
    max_steps: Count | None = Field(
        None, ge=1, description="optimizer steps to run; overrides num_train_epochs when both are given"
    )
    num_train_epochs: float | None = Field(
        None, gt=0, description="passes over the training text; none: 1, unless max_steps is given"
    )
    micro_batch_size: int | None = Field(
        None, ge=1, description="rows in one forward and backward pass; none: from size"
    )
    gradient_accumulation_steps: int = Field(
        1, ge=1, description="micro-batches in one optimizer step, weighted by their tokens: 1x8 equals 8x1"
    )
    learning_rate: float | None = Field(None, gt=0, description="peak learning rate; none: from size")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="last learning rate as a share of the peak")
    warmup_ratio: float = Field(
        0.02, ge=0, le=1, description="share of the steps in which the learning rate rises from 0 to its peak"
    )
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "cosine", description="after the warm-up: cosine decay; wsd: stable, then decay; constant"
    )
    decay_ratio: float = Field(
        0.2, ge=0, le=1, description="wsd: share of the steps spent decaying at the end"
    )
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="adamw for all; muon: Muon for the matrices in the blocks, AdamW for the rest"
    )
    weight_decay: float = Field(0.1, ge=0, description="decoupled decay of matrices (norms and biases: none)")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW: decay of the mean of the gradient")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW: decay of the mean of its square")
    max_grad_norm: float = Field(1.0, ge=0, description="clip the gradient to this norm; 0: never")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="number type of the matrix products; auto: the faster one by a short measurement"
    )
    compile: Literal["auto"] | bool = Field(
        "auto",
        description="torch.compile (20 to 60 s at the start); auto: when the run is long enough to repay it",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="keep only each block's input and compute the rest twice: less memory, a third slower",
    )
    save_every: int | None = Field(
        None, ge=1, description="steps between checkpoints; none: about two minutes' worth"
    )
    eval_every: int | None = Field(
        None, ge=1, description="steps between validations on the held-out documents; none: ten times a run"
    )
    keep_last: int = Field(2, ge=1, description="checkpoints to keep, beside the best")
    log_every: int = Field(10, ge=1, description="steps between lines in metrics.jsonl")
    non_finite: Literal["stop", "skip"] = Field(
        "stop", description="a loss or gradient that is NaN or infinite: stop and name the documents, or skip "
        "the step and count it",
    )  # fmt: skip
    threads: Threads = None
    device: Device = "auto"


class PretrainSettings(Settings):
    """`langmill pretrain`: documents or shards in, a model folder out."""

    path: list[str] = Field(min_length=1, description="text files, folders of them, or prepared shards")
    out: Path = Field(description="model folder to write; its private run folder is OUT.run")
    from_model: str | None = Field(
        None,
        alias="from",
        description="go on from this model: folder, .gguf file or hub id; brings its tokenizer",
    )
    resume: bool = Field(False, description="go on with an interrupted run in the same --out")
    force: bool = Field(False, description="replace an existing --out")
    seed: Seed = 0
    track: bool = Field(False, description="write TensorBoard files too (extra: track)")
    data: DataSettings = DataSettings()
    tokenizer: TokenizerSettings = TokenizerSettings()
    model: ModelSettings = ModelSettings()
    train: TrainSettings = TrainSettings()


class LoRASettings(Settings):
    """The adapters that are trained in place of a model's own weights."""

    lora_r: int = Field(
        16, ge=1, le=4096, description="rank of the change: more learns more and takes more memory"
    )
    lora_alpha: float = Field(32.0, gt=0, description="the change is scaled by alpha / r")
    lora_dropout: float = Field(
        0.0, ge=0, lt=1, description="share of an adapter's inputs dropped in training"
    )
    lora_targets: list[str] = Field(
        default_factory=list, description="layers to adapt, such as q_proj v_proj; none: all linear ones"
    )
    use_rslora: bool = Field(False, description="scale by alpha / sqrt(r), for high ranks")
    use_dora: bool = Field(False, description="learn the lengths of the weights' rows apart (DoRA); slower")


class FinetuneTrainSettings(TrainSettings):
    """Training settings whose defaults suit a model that knows much already."""

    num_train_epochs: float | None = Field(
        3.0, gt=0, description="passes over the examples, unless max_steps is given"
    )
    warmup_ratio: float = Field(
        0.03, ge=0, lt=1, description="share of the steps in which the learning rate rises from 0 to its peak"
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay of matrices (norms and biases: none)")
    beta2: float = Field(0.999, gt=0, lt=1, description="AdamW: decay of the mean of the gradient's square")


class PreferSettings(Settings):
    """What is learned from preferences, and how strongly."""

    loss: Literal["dpo", "ipo", "kto", "orpo", "simpo"] = Field(
        "dpo",
        description="dpo; ipo: does not run off where every label agrees; kto: from single answers with a label; orpo "
        "and simpo: without a reference, orpo learns the chosen answers too",
    )
    beta: float | None = Field(
        None,
        gt=0,
        description="how closely the model keeps to where it began (ipo's tau, orpo's lambda); none: 0.1, simpo 2",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="dpo, simpo: share of the labels that is thought wrong"
    )
    simpo_gamma: float = Field(0.5, ge=0, description="simpo: the margin to reach, in rewards")
    desirable_weight: float = Field(1.0, gt=0, description="kto: what a good answer weighs")
    undesirable_weight: float = Field(1.0, gt=0, description="kto: what a bad answer weighs")


class TaskSettings(Settings):
    """What is learned from labels, tags, answers, translations and pairs, and how."""

    kind: Literal["multilabel", "regress"] | None = Field(
        None, description="classify: any number of labels a text, or a number; none: as the labels' form says"
    )
    long_texts: Literal["error", "truncate", "window"] | None = Field(
        None,
        description="texts longer than the model reads: refuse, keep the beginning, or overlapping windows, counted; "
        "none: truncate, but window for tag and answer",
    )
    length: int | None = Field(
        None, ge=8, description="tokens of one text or window; none: what the model reads, at most 512"
    )
    overlap: int = Field(64, ge=0, description="tokens that a window shares with the one before")
    batch_size: int = Field(32, ge=1, description="texts in one optimizer step, about")
    class_weights: bool = Field(
        False, description="classify, tag: rare labels weigh as much as frequent ones"
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="classify, translate: share of the target that is spread over all"
    )
    patience: int | None = Field(
        None, ge=1, description="stop after so many validations in a row without a better one; none: never"
    )
    source: str = Field("source", description="translate: the field, or the language, to translate from")
    target: str = Field("target", description="translate: the field, or the language, to translate to")
    pool: Literal["mean", "first", "last"] = Field(
        "mean", description="embed: how a text's tokens become one vector"
    )
    scale: float = Field(20.0, gt=0, description="embed: what cosines are multiplied by (1 / temperature)")
    dims: list[int] = Field(
        default_factory=list, description="embed: lengths at which vectors may be cut later (Matryoshka)"
    )


class FinetuneSettings(Settings):
    """`langmill finetune`: a model and a file of conversations in, an adapter or a model out."""

    model: str = Field(description="model to start from: folder, .gguf file or hub id")
    task: Literal["chat", "prefer", "classify", "tag", "answer", "translate", "embed"] = Field(
        "chat",
        description="chat: answer as the conversations' assistant does; prefer: rather as chosen than as rejected; "
        "classify texts; tag words; answer from a text; translate; embed: like texts near each other",
    )
    data: list[str] = Field(
        min_length=1,
        description="conversations: .jsonl (.gz, .zst), .json or .parquet with messages, prompt and completion, Alpaca "
        "or ShareGPT rows; prefer: prompt, chosen and rejected, or prompt, completion and label; other tasks: text and "
        "label, tokens and tags, SQuAD, translation, anchor and positive, .csv and .tsv too (repeatable)",
    )
    out: Path = Field(
        Path("langmill-finetuned"), description="folder to write; its private run folder is OUT.run"
    )
    method: Literal["lora", "qlora", "full"] | None = Field(
        None,
        description="lora: train a small adapter; qlora: on 4-bit weights, least memory; full: all weights; none: lora "
        "for chat and prefer, full for the other tasks",
    )
    too_long: Literal["drop", "truncate", "split"] = Field(
        "drop",
        description="examples longer than max_length: leave out, keep the beginning, or train in pieces",
    )
    holdout: float = Field(
        0.05, ge=0, lt=1, description="share of the examples kept out of training for evaluation, by a hash"
    )
    template: Path | None = Field(
        None, description="a Jinja chat template to use in place of the model's own, or where it has none"
    )
    preview: int = Field(
        0, ge=0, description="show so many examples with what is trained in colour, and stop"
    )
    samples: int = Field(4, ge=0, description="held-out prompts answered before and after, for the report")
    resume: bool = Field(False, description="go on with an interrupted run in the same --out")
    force: bool = Field(False, description="replace an existing --out")
    seed: Seed = 0
    track: bool = Field(False, description="write TensorBoard files too (extra: track)")
    lora: LoRASettings = LoRASettings()
    prefer: PreferSettings = PreferSettings()
    tasks: TaskSettings = TaskSettings()
    train: FinetuneTrainSettings = FinetuneTrainSettings()


class MergeSettings(Settings):
    """`langmill merge`: an adapter worked into its model."""

    adapter: str = Field(description="folder of a PEFT adapter")
    out: Path = Field(description="model folder to write")
    base: str | None = Field(None, description="the model it belongs to; none: as the adapter names it")
    force: bool = Field(False, description="replace an existing --out")


class QuickstartSettings(Settings):
    """`langmill quickstart`: text to model to report, in minutes."""

    text: list[str] = Field(
        default_factory=list, description="your text: files or folders; none: the manual that CPython carries"
    )
    out: Path = Field(Path("langmill-quickstart"), description="folder for the models and report.html")
    minutes: float = Field(4.0, gt=0, description="time to aim for; the steps are sized by a short probe")
    force: bool = Field(False, description="replace an existing --out")
    seed: Seed = 0
    data: DataSettings = DataSettings()


class PlanSettings(Settings):
    """`langmill plan`: what a run would cost, before it runs."""

    path: list[str] = Field(
        default_factory=list, description="the text to train on, measured for its tokens; none: give tokens"
    )
    from_model: str | None = Field(
        None, alias="from", description="plan to go on from this model: folder, .gguf file or hub id"
    )
    tokens: Count | None = Field(
        None, ge=1, description="tokens to train on; none: from PATH, or 20 for each parameter"
    )
    budget: str | None = Field(
        None, description="time to spend, such as 90s, 30m, 8h or 2d: prints the compute-optimal size for it"
    )
    probe: bool = Field(True, description="measure this machine for some seconds; false: closed forms only")
    seed: Seed = 0
    data: DataSettings = DataSettings()
    tokenizer: TokenizerSettings = TokenizerSettings()
    model: ModelSettings = ModelSettings()
    train: TrainSettings = TrainSettings()


class EvaluateSettings(Settings):
    """`langmill evaluate`: loss, perplexity and bits per byte, with an interval."""

    model: str = Field(description="model folder, .gguf file or hub id")
    on: list[str] = Field(min_length=1, description="text files, folders of them, or prepared shards")
    split: Literal["all", "held_out"] = Field(
        "all", description="held_out: only the documents that training with the same data.holdout kept out"
    )
    max_length: int | None = Field(
        None, ge=2, description="tokens in one window; none: the model's own, at most 1024"
    )
    micro_batch_size: int = Field(8, ge=1, description="windows in one forward pass")
    resamples: int = Field(1000, ge=1, description="bootstrap resamples over documents for the 95 % interval")
    seed: Seed = 0
    dtype: UseDtype = "auto"
    device: Device = "auto"
    threads: Threads = None
    data: DataSettings = DataSettings()


class ShardsSettings(Settings):
    """`langmill data shards`: documents to memory-mapped token shards."""

    path: list[str] = Field(min_length=1, description="text files or folders of them")
    tokenizer: str = Field(description="a tokenizer.json, or a folder that holds one")
    out: Path = Field(description="folder to write the shards and their index to")
    force: bool = Field(False, description="replace an existing --out")
    data: DataSettings = DataSettings()


class TokenizerTrainSettings(Settings):
    """`langmill tokenizer train`: a vocabulary from a bounded sample of text."""

    path: list[str] = Field(min_length=1, description="text files or folders of them")
    out: Path = Field(description="folder for tokenizer.json and its companions; X.json: that file alone")
    force: bool = Field(False, description="replace an existing --out")
    kind: Literal["bpe", "wordpiece", "unigram"] = Field(
        "bpe", description="bpe (byte-level) loses nothing and knows every character"
    )
    vocab_size: VocabularySize = None
    sample_bytes: SampleBytes = 64 << 20
    data: DataSettings = DataSettings()


class TokenizerInspectSettings(Settings):
    """`langmill tokenizer inspect`: what a tokenizer holds and what it makes of a text."""

    tokenizer: str = Field(description="a tokenizer.json, a folder that holds one, or a .gguf file")
    text: str | None = Field(None, description="show the tokens of this text")
