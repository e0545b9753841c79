"""Encoder-decoders as other tools leave them: bodies alone, tensors under one of several names, T5's two classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from langmill.common.errors import ModelError
from langmill.families import family, folder

AUTO = transformers.AutoModelForSeq2SeqLM
SHAPES = {name: shape for kind in ("bart", "t5") for name, shape in family(kind, "test").TINY.items()}


def reference(name: str, auto: Any, where: Path) -> Any:
    """transformers' model of random weights, saved by itself."""
    config = transformers.AutoConfig.for_model(name.split("-")[0], **SHAPES[name])
    torch.manual_seed(0)
    model = (auto.from_config if hasattr(auto, "from_config") else auto)(config).eval()
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data.normal_(1.0 if weight.dim() == 1 else 0.0, 0.1)
    model.save_pretrained(where)
    return model


def changed(where: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """The folder with its tensors changed."""
    file = where / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


@torch.no_grad()
def same_logits(where: Path, auto: type = AUTO, ours: Path | None = None) -> None:
    """What transformers reads in one folder and what is read here, in the same or another, give the same logits."""
    source, target = torch.arange(4, 20)[None], torch.arange(30, 41)[None]
    theirs = auto.from_pretrained(where).eval()
    mine = folder.load_model(ours or where)(target, encoder_tokens=source)
    torch.testing.assert_close(mine, theirs(source, decoder_input_ids=target).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", SHAPES)
def test_a_body_alone_is_what_writes(name: str, tmp_path: Path) -> None:
    reference(name, transformers.AutoModel, tmp_path / "body")
    same_logits(tmp_path / "body")
    folder.save(folder.load_model(tmp_path / "body"), None, tmp_path / "ours")
    same_logits(tmp_path / "ours", ours=tmp_path / "body")


def test_an_encoder_alone_is_refused_by_name(tmp_path: Path) -> None:
    reference("t5", transformers.T5EncoderModel, tmp_path)
    with pytest.raises(ModelError, match="the model that writes is supported, not T5EncoderModel"):
        folder.load_model(tmp_path)


@pytest.mark.parametrize("name", ["bart", "marian", "t5"])
@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_the_embedding_may_stand_under_a_users_name(name: str, side: str, tmp_path: Path) -> None:
    reference(name, AUTO, tmp_path)

    def moved(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key.replace("shared.", f"{side}.embed_tokens."): tensor for key, tensor in state.items()}

    changed(tmp_path, moved)
    same_logits(tmp_path)
    changed(
        tmp_path, lambda state: {key: tensor for key, tensor in state.items() if "embed_tokens" not in key}
    )
    with pytest.raises(ModelError, match=r"shared\.weight is missing"):
        folder.load_model(tmp_path)


@pytest.mark.parametrize("name", ["bart", "marian"])
def test_scores_without_a_bias_have_none(name: str, tmp_path: Path) -> None:
    reference(name, AUTO, tmp_path)
    changed(
        tmp_path, lambda state: {key: tensor for key, tensor in state.items() if key != "final_logits_bias"}
    )
    same_logits(tmp_path)


def test_a_bart_that_classifies_may_hold_what_writes(tmp_path: Path) -> None:
    theirs = reference("bart", transformers.AutoModelForSequenceClassification, tmp_path)
    left = {
        "final_logits_bias": torch.ones(1, 97),
        "lm_head.weight": torch.ones(97, 32),
        "qa_outputs.bias": torch.ones(2),
    }
    changed(tmp_path, lambda state: state | left)
    text = torch.tensor([[5, 6, 7, theirs.config.eos_token_id]])
    torch.testing.assert_close(folder.load_model(tmp_path)(text), theirs(text).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["t5", "t5-v1.1", "mt5"])
def test_both_classes_read_what_is_saved(name: str, tied: bool, tmp_path: Path) -> None:
    """T5 v1.1 is saved as mT5, and T5's own class must not scale its states either."""
    reference(name, AUTO, tmp_path / "theirs")
    if not tied:
        changed(tmp_path / "theirs", lambda state: state | {"lm_head.weight": torch.randn(97, 32)})
    folder.save(folder.load_model(tmp_path / "theirs"), None, tmp_path / "ours")
    for auto in (AUTO, transformers.T5ForConditionalGeneration):
        same_logits(tmp_path / "ours", auto, tmp_path / "theirs")
