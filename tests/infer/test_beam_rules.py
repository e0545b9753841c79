"""The rules of generation_config.json, as transformers' generate keeps them, on random encoder-decoders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from langmill.common.errors import ModelError
from langmill.families import folder
from langmill.families.generation import Writing, rules_of
from langmill.infer.beam import beam_search

SHAPE = {
    "vocab_size": 97, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40, "max_position_embeddings": 64,
}  # fmt: skip
MARIAN = {"pad_token_id": 96, "decoder_start_token_id": 96, "eos_token_id": 0, "scale_embedding": True}
SOURCES = torch.randint(4, 90, (3, 9), generator=torch.Generator().manual_seed(1))
LIMIT = 12
RULES: dict[str, dict[str, Any]] = {
    "none": {},
    "forced bos": {"forced_bos_token_id": 5},
    "forced eos": {"forced_eos_token_id": 2, "min_length": 12},
    "least": {"min_length": 8},
    "least of new": {"min_new_tokens": 6, "forced_eos_token_id": [2]},
    "never": {"suppress_tokens": list(range(40, 60)), "early_stopping": "never", "min_length": 4},
    "again": {"renormalize_logits": True, "suppress_tokens": list(range(20, 60)), "no_repeat_ngram_size": 1},
    "all": {"forced_bos_token_id": 0, "no_repeat_ngram_size": 2, "min_length": 5, "forced_eos_token_id": 2},
}


def made(where: Path, bias: float = 0.0, **said: Any) -> Any:
    """A random BART, or with a bias for its pad id a Marian, whose generation_config.json says so, as transformers
    reads it."""
    kind, more = (
        (transformers.MarianMTModel, MARIAN) if bias else (transformers.BartForConditionalGeneration, {})
    )
    torch.manual_seed(3)
    model: Any = kind(kind.config_class(**SHAPE, **more))
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data.normal_(1.0 if weight.dim() == 1 else 0.0, 0.25)
    model.final_logits_bias.normal_(0.0, 0.5)
    model.final_logits_bias[0, 96 if bias else 2] += bias or 5.0  # so that it ends
    model.save_pretrained(where)
    path = where / "generation_config.json"
    config = {**json.loads(path.read_text()), "forced_eos_token_id": None, **said}
    path.write_text(json.dumps(config))
    return kind.from_pretrained(where).eval()


def answers(theirs: Any, where: Path, beams: int, end: int) -> tuple[list[list[int]], list[list[int]]]:
    ours = folder.load_model(where)
    rules = rules_of(ours)
    found = beam_search(
        ours, SOURCES.tolist(), stops=[end], beams=beams, max_new_tokens=LIMIT, early_stopping=rules.early
    )
    out = theirs.generate(SOURCES, num_beams=beams, max_new_tokens=LIMIT, do_sample=False)[:, 1:].tolist()
    wanted = [ids[: ids.index(end)] if end in ids else ids for ids in out]
    return [own[0].ids for own in found], wanted


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", RULES)
def test_rules_are_kept_as_transformers_keeps_them(name: str, beams: int, tmp_path: Path) -> None:
    found, wanted = answers(made(tmp_path, **RULES[name]), tmp_path, beams, 2)
    assert found == wanted
    if name != "none" and beams == 3:
        free = beam_search(
            folder.load_model(tmp_path),
            SOURCES.tolist(),
            stops=[2],
            beams=3,
            max_new_tokens=LIMIT,
            rules=Writing(),
        )
        assert found != [own[0].ids for own in free], "a rule that changes nothing tests nothing"


@pytest.mark.parametrize("beams", [1, 3])
def test_what_is_banned_is_not_completed(beams: int, tmp_path: Path) -> None:
    """As opus-mt bans its pad id, which it would write for ever; and sequences of ids."""
    theirs = made(tmp_path / "free", bias=9.0)
    found, _ = answers(theirs, tmp_path / "free", beams, 0)
    assert all(set(ids) == {96} for ids in found)
    theirs = made(tmp_path / "pad", bias=9.0, bad_words_ids=[[96], [0]], forced_eos_token_id=0)
    found, wanted = answers(theirs, tmp_path / "pad", beams, 0)
    assert found == wanted and not any(96 in ids for ids in found)
    pairs = [[ids[0], ids[1]] for ids in found] + [found[0][1:4]]
    theirs = made(tmp_path / "pairs", bias=9.0, bad_words_ids=[[96], *pairs])
    found, wanted = answers(theirs, tmp_path / "pairs", beams, 0)
    assert found == wanted and not any([ids[0], ids[1]] in pairs for ids in found)


def test_no_n_gram_comes_twice_not_even_the_start(tmp_path: Path) -> None:
    theirs = made(tmp_path, no_repeat_ngram_size=2)
    found, wanted = answers(theirs, tmp_path, 3, 2)
    assert found == wanted
    for ids in found:
        pairs = list(zip([2, *ids], ids, strict=False))
        assert len(pairs) == len(set(pairs))


def test_an_end_that_is_forced_is_a_cut(tmp_path: Path) -> None:
    made(tmp_path, forced_eos_token_id=2, min_length=40)
    (found,) = beam_search(
        folder.load_model(tmp_path), SOURCES[:1].tolist(), stops=[2], beams=2, max_new_tokens=6
    )
    assert len(found[0].ids) == 5 and not found[0].ended


def test_rules_that_leave_nothing_are_told(tmp_path: Path) -> None:
    made(tmp_path, suppress_tokens=list(range(97)), min_length=40)
    with pytest.raises(ModelError, match="bans leaves no token to write"):
        beam_search(folder.load_model(tmp_path), SOURCES[:1].tolist(), stops=[2], beams=2, max_new_tokens=6)
