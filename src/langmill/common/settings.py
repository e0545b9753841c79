"""What a run can be told: one frozen class a command, grouped as `data.`, `tokenizer.`, `model.`, `train.`.

Every field's description is what `--help` prints. None always means "chosen for you", and the
description says by what. Counts may be written 64M or 2G (powers of ten), 64MiB (powers of two).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from langmill.common.compress_settings import CompressSettings as CompressSettings
from langmill.common.data_settings import DataSettings as DataSettings
from langmill.common.evaluate_settings import EvaluateSettings as EvaluateSettings
from langmill.common.export_settings import ExportSettings as ExportSettings
from langmill.common.prepare_settings import ForgetSettings as ForgetSettings
from langmill.common.prepare_settings import PreparedSettings as PreparedSettings
from langmill.common.prepare_settings import PrepareSettings as PrepareSettings
from langmill.common.prepare_settings import WhySettings as WhySettings
from langmill.common.privacy_settings import RedactSettings as RedactSettings
from langmill.common.serve_settings import ServeSettings as ServeSettings
from langmill.common.setting import Count as Count
from langmill.common.setting import Device as Device
from langmill.common.setting import SampleBytes as SampleBytes
from langmill.common.setting import Seed as Seed
from langmill.common.setting import Settings as Settings
from langmill.common.setting import Threads as Threads
from langmill.common.setting import UseDtype as UseDtype
from langmill.common.setting import VocabularySize as VocabularySize
from langmill.common.setting import parse_count as parse_count
from langmill.common.train_settings import FinetuneTrainSettings as FinetuneTrainSettings
from langmill.common.train_settings import LoopSettings as LoopSettings
from langmill.common.train_settings import ModelSettings as ModelSettings
from langmill.common.train_settings import TrainSettings as TrainSettings
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
        default_factory=list,
        description="layers to adapt, as the family names them, such as q_proj v_proj or query value; none: all",
    )
    use_rslora: bool = Field(False, description="scale by alpha / sqrt(r), for high ranks")
    use_dora: bool = Field(False, description="learn the lengths of the weights' rows apart (DoRA); slower")


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


class ReinforceSettings(Settings):
    """What is learned from rewards: how many answers are written and judged, and how far a step may go."""

    reward: list[str] = Field(
        default_factory=list,
        description="function that judges answers, as module:function or file.py:function; it is called as "
        "function(prompts=…, completions=…, one list for each further field of the rows) and returns a number for each "
        "completion (repeatable: their sum counts)",
    )
    reward_weights: list[float] = Field(
        default_factory=list, description="what each reward function weighs in the sum; none: 1 each"
    )
    prompts_per_step: int = Field(8, ge=1, description="prompts answered anew for each update of the weights")
    num_generations: int = Field(
        8, ge=2, description="answers to each prompt, which are compared with each other"
    )
    max_completion_length: int = Field(256, ge=1, description="tokens that an answer may have")
    temperature: float = Field(
        1.0, gt=0, description="of the answers that are learnt from; lower: more alike"
    )
    num_iterations: int = Field(
        1, ge=1, description="optimizer steps on the same answers before new ones are written"
    )
    beta: float = Field(
        0.04,
        ge=0,
        description="weight of the KL divergence from the model that training began with; 0: none, faster",
    )
    epsilon: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="a token's probability ratio counts no further than epsilon below and above 1",
    )
    epsilon_high: float | None = Field(
        None, gt=0, description="the upper bound apart (DAPO takes 0.28); none: as epsilon"
    )
    loss_type: Literal["dapo", "bnpo", "grpo", "dr_grpo"] = Field(
        "dapo",
        description="dapo: every token of a step weighs the same (bnpo too, since a step is weighed as a whole); grpo: "
        "every answer, however long; dr_grpo: tokens, over the longest length that is allowed",
    )
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "group",
        description="advantages are divided by the standard deviation of a prompt's answers, of all, or not",
    )
    mask_truncated_completions: bool = Field(
        False, description="do not learn from answers that were cut at max_completion_length"
    )


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
    check_languages: bool = Field(
        True,
        description="translate: leave out rows with a side that is plainly in another language than its name (en, de, "
        "zh, …) says; extra: data tells languages of one script apart",
    )
    pool: Literal["auto", "mean", "first", "last"] = Field(
        "auto",
        description="embed: how a text's tokens become one vector; auto: as the base model's folder says, or mean",
    )
    scale: float = Field(20.0, gt=0, description="embed: what cosines are multiplied by (1 / temperature)")
    dims: list[int] = Field(
        default_factory=list, description="embed: lengths at which vectors may be cut later (Matryoshka)"
    )


class FinetuneSettings(Settings):
    """`langmill finetune`: a model and a file of conversations in, an adapter or a model out."""

    model: str = Field(description="model to start from: folder, .gguf file or hub id")
    task: Literal["chat", "prefer", "reinforce", "classify", "tag", "answer", "translate", "embed"] = Field(
        "chat",
        description="chat: answer as the conversations' assistant does; prefer: rather as chosen than as rejected; "
        "reinforce: as a function of yours rewards (GRPO); classify texts; tag words; answer from a text; translate; "
        "embed: like texts near each other",
    )
    data: list[str] = Field(
        min_length=1,
        description="conversations: .jsonl (.gz, .zst), .json or .parquet with messages, prompt and completion, Alpaca "
        "or ShareGPT rows; prefer: prompt, chosen and rejected, or prompt, completion and label; reinforce: prompt "
        "and what the reward function asks for; other tasks: text and label, tokens and tags, SQuAD, translation, "
        "anchor and positive, .csv and .tsv too (repeatable)",
    )
    out: Path = Field(
        Path("langmill-finetuned"), description="folder to write; its private run folder is OUT.run"
    )
    method: Literal["lora", "qlora", "full"] | None = Field(
        None,
        description="lora: train a small adapter; qlora: on 4-bit weights, least memory; full: all weights; none: lora "
        "for chat, prefer and reinforce, full for the other tasks",
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
    reinforce: ReinforceSettings = ReinforceSettings()
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
    marks: list[Literal["mask", "fim", "sentinels"]] = Field(
        default_factory=list,
        description="control tokens to add, for pretraining with this tokenizer later: mask (objective masked, and "
        "denoise), fim (infill), sentinels (blanks, denoise of t5); repeatable",
    )
    data: DataSettings = DataSettings()


class TokenizerInspectSettings(Settings):
    """`langmill tokenizer inspect`: what a tokenizer holds and what it makes of a text."""

    tokenizer: str = Field(description="a tokenizer.json, a folder that holds one, or a .gguf file")
    text: str | None = Field(None, description="show the tokens of this text")
