"""What the commands that train can be told of model and training; see settings.py."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from langmill.common.setting import Count, Device, Settings, Threads


class ModelSettings(Settings):
    """The model's shape: one dial, `size`, and an override for each number behind it."""

    family: Literal["llama", "gpt2", "qwen3", "lstm", "bert", "marian", "t5"] | None = Field(
        None,
        description="architecture: llama, gpt2, qwen3 and lstm write (lstm is a recurrent baseline that other tools "
        "cannot load), bert reads, marian and t5 read and write; none: llama, for masked bert, for denoise marian",
    )
    size: str = Field(
        "small", description="tiny, small, base, ... (see `langmill plan`), or a parameter count such as 10M"
    )
    layers: int | None = Field(None, ge=1, description="blocks in the stack, in each of two; none: from size")
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


class LoopSettings(Settings):
    """The training loop: how much, how fast, with which optimizer, and what it keeps."""

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
    dropout: float = Field(
        0.0, ge=0, lt=1, description="share of what is embedded, and of what each layer adds, to drop while training; "
        "0.1 helps where there are few examples",
    )  # fmt: skip
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


class TrainSettings(LoopSettings):
    """The loop that pretrains, and what it learns to predict."""

    objective: Literal["causal", "masked", "infill", "blanks", "denoise"] = Field(
        "causal",
        description="causal: predict the next token; masked: guess hidden ones; infill: causal, with the middle of "
        "half the texts last; blanks: causal, and of half the texts what was taken out of them, behind each (GLM); "
        "denoise: write what an encoder reads damaged (marian: sentences shuffled and spans masked; t5: spans alone)",
    )
    mask_rate: float | None = Field(
        None, gt=0, lt=1,
        description="masked, blanks, denoise: share of the tokens to guess or to take out; none: 0.15, marian 0.3",
    )  # fmt: skip
    whole_words: bool = Field(False, description="masked: hide all tokens of a word or none")


class FinetuneTrainSettings(LoopSettings):
    """Training settings whose defaults suit a model that knows much already."""

    num_train_epochs: float | None = Field(
        3.0, gt=0, description="passes over the examples, unless max_steps is given"
    )
    warmup_ratio: float = Field(
        0.03, ge=0, lt=1, description="share of the steps in which the learning rate rises from 0 to its peak"
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay of matrices (norms and biases: none)")
    beta2: float = Field(0.999, gt=0, lt=1, description="AdamW: decay of the mean of the gradient's square")
