"""Beam search against transformers' generate, on random encoder-decoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from langmill.common.errors import ModelError, UsageError
from langmill.families import family, folder
from langmill.families.generation import Writing
from langmill.infer.beam import beam_search
from langmill.model.init import init_
from langmill.model.transformer import Transformer
from langmill.text.tokenizer import Tokenizer

SHAPES = {name: shape for kind in ("bart", "t5") for name, shape in family(kind, "test").TINY.items()}
SOURCES = [[5, 6, 7, 8, 9, 10], [40, 41], [90, 80, 70, 60, 50, 40, 30, 20, 10, 3, 4, 5]]
STOPS = list(range(2, 97, 7))


def made(name: str, where: Path) -> tuple[Any, Any]:
    config = transformers.AutoConfig.for_model(
        name.split("-")[0], **SHAPES[name] | ({"num_decoder_layers": 2} if name == "t5" else {})
    )
    torch.manual_seed(3)
    theirs = transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
    for weight in theirs.parameters():
        if weight.requires_grad:
            weight.data.normal_(1.0 if weight.dim() == 1 else 0.0, 0.25)
    theirs.save_pretrained(where)
    return theirs, folder.load_model(where)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("penalty", [0.6, 1.0, 2.0])
@pytest.mark.parametrize("name", ["bart", "marian", "t5"])
def test_the_answers_are_those_of_transformers(
    name: str, penalty: float, early: bool, tmp_path: Path
) -> None:
    theirs, ours = made(name, tmp_path)
    found = beam_search(
        ours,
        SOURCES,
        stops=STOPS,
        beams=4,
        n_best=3,
        length_penalty=penalty,
        max_new_tokens=20,
        early_stopping=early,
        rules=Writing(),
    )
    pad = theirs.config.pad_token_id
    longest = max(map(len, SOURCES))
    rows = torch.tensor([ids + [pad] * (longest - len(ids)) for ids in SOURCES])
    inside = torch.arange(longest)[None] < torch.tensor([[len(ids)] for ids in SOURCES])
    out = theirs.generate(
        rows, attention_mask=inside.long(), num_beams=4, num_return_sequences=3, max_new_tokens=20, do_sample=False,
        length_penalty=penalty, early_stopping=early, eos_token_id=STOPS, forced_eos_token_id=None,
        decoder_start_token_id=ours.config.decoder_input.start, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    ended = 0
    for place, hypothesis in enumerate(h for answers in found for h in answers):
        expected = out.sequences[place].tolist()[1:]
        end = next((i for i, id in enumerate(expected) if id in STOPS), None)
        assert hypothesis.ids == expected[: 20 if end is None else end]
        assert hypothesis.ended == (end is not None)
        assert hypothesis.score == pytest.approx(float(out.sequences_scores[place]), abs=1e-4)
        ended += hypothesis.ended
    assert ended


def test_company_changes_nothing(tmp_path: Path) -> None:
    """A sentence's answers do not depend on those beside it, which are done earlier or later."""
    _, ours = made("marian", tmp_path)
    together = beam_search(ours, SOURCES, stops=STOPS, beams=3, n_best=3, max_new_tokens=30)
    for source, answers in zip(SOURCES, together, strict=True):
        (alone,) = beam_search(ours, [source], stops=STOPS, beams=3, n_best=3, max_new_tokens=30)
        assert [h.ids for h in alone] == [h.ids for h in answers]


def test_one_beam_is_greedy(tmp_path: Path) -> None:
    _, ours = made("bart", tmp_path)
    ((found,),) = beam_search(ours, SOURCES[:1], stops=STOPS, beams=1, max_new_tokens=12, rules=Writing())
    ids = [ours.config.decoder_input.start]
    source = torch.tensor(SOURCES[:1])
    for _ in range(12):
        ids.append(int(ours(torch.tensor([ids]), encoder_tokens=source)[0, -1].argmax()))
        if ids[-1] in STOPS:
            break
    assert found.ids == [id for id in ids[1:] if id not in STOPS]


def test_bad_input_is_refused(tmp_path: Path) -> None:
    _, ours = made("bart", tmp_path)
    with pytest.raises(UsageError, match="n_best is 3"):
        beam_search(ours, SOURCES, stops=STOPS, beams=2, n_best=3)
    with pytest.raises(ModelError, match="65 tokens; this model reads 1 to 64"):
        beam_search(ours, [[5] * 65], stops=STOPS)
    with pytest.raises(ModelError, match="has no tokens|reads 1 to 64"):
        beam_search(ours, [[]], stops=STOPS)
    assert beam_search(ours, [], stops=STOPS) == []


@pytest.mark.parametrize("name", ["marian", "t5"])
def test_a_folder_of_ours_says_how_its_decoder_begins(name: str, tmp_path: Path) -> None:
    """transformers begins with bos where generation_config.json does not say."""
    tokenizer = Tokenizer.train(["The quick brown fox jumps over the lazy dog."] * 9, 300)
    kind = family(name, "the test")
    theirs = {**kind.TINY[name], "vocab_size": 320, "pad_token_id": tokenizer.pad_id}
    theirs |= {
        "decoder_start_token_id": tokenizer.pad_id,
        "num_decoder_layers": 2,
    }  # theirs caches no other number
    model = Transformer(kind.config(theirs))
    init_(model, 0)
    folder.save(model, tokenizer, tmp_path / "m")
    source = torch.tensor([[5, 9, 17, 40]])
    read = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "m").eval()
    assert (
        read.generation_config.decoder_start_token_id
        == tokenizer.pad_id
        != read.generation_config.bos_token_id
    )
    out = read.generate(source, num_beams=2, max_new_tokens=6, do_sample=False)
    assert out[0, 0] == tokenizer.pad_id
