"""Masked models fill masks as transformers' fill-mask does, with clear errors where they cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from langmill import cli
from langmill.apps import generate
from langmill.common.configure import configure
from langmill.common.errors import DataError, ModelError, UsageError
from langmill.common.settings import GenerateSettings
from langmill.families import folder as folders
from langmill.text.mask import Masks
from langmill.text.specials import Specials
from langmill.text.tokenizer import Tokenizer
from langmill.text.training import MARKS

TEXTS = [
    "The quick brown fox jumps over Paris. 春眠不觉晓，处处闻啼鸟。 الثعلب البني السريع يقفز فوق الكلب"
] * 3
LENGTH = 32


def wordpiece() -> Tokenizer:
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=160, special_tokens=names, show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return Tokenizer(backend, Specials(bos=2, eos=3, pad=0, mask=4, add_bos=True))


KINDS: dict[str, Any] = {
    "bert": (transformers.BertForMaskedLM, transformers.BertConfig),
    "roberta": (transformers.RobertaForMaskedLM, transformers.RobertaConfig),
    "distilbert": (transformers.DistilBertForMaskedLM, transformers.DistilBertConfig),
}


@pytest.fixture(scope="module", params=KINDS)
def masked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of random weights: BERT's WordPiece, for RoBERTa a byte-level vocabulary that was trained here."""
    folder = tmp_path_factory.mktemp(request.param) / "model"
    own = request.param == "roberta"
    tokenizer = Tokenizer.train(TEXTS, 500, specials=MARKS["mask"]) if own else wordpiece()
    model, config = KINDS[request.param]
    shape: dict[str, Any] = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "dim": 32,
        "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "pad_token_id": tokenizer.pad_id,
    }  # fmt: skip
    torch.manual_seed(0)
    length = LENGTH + (tokenizer.fill_id + 1 if own else 0)
    made = model(config(vocab_size=tokenizer.vocab_size, max_position_embeddings=length, **shape))
    for weight in made.parameters():
        weight.data.mul_(4 if weight.dim() > 1 else 1)
    made.save_pretrained(folder)
    tokenizer.save(folder)
    loaded, _ = folders.load(folder)
    folders.save(loaded, tokenizer, folder, replace=True)  # what is read is what this project writes
    return str(folder)


def run(model: str, **given: Any) -> Any:
    return generate.run(configure(GenerateSettings, None, [], model=model, device="cpu", **given), quiet=True)


def test_tokens_and_scores_are_those_of_fill_mask(masked: str) -> None:
    pipe = transformers.pipeline("fill-mask", model=masked, device="cpu")
    own = pipe.tokenizer.mask_token
    assert pipe.tokenizer.model_max_length == LENGTH
    texts = [f"The {own} fox jumps over {own}.", f"春眠{own}觉晓", f"{own} البني السريع", f"jump{own}"]
    ours = run(masked, prompt=texts, top=7)
    assert ours.counts["masks"] == 5 and [one["prompt"] for one in ours.extra["results"]] == texts
    for text, one in zip(texts, ours.extra["results"], strict=True):
        theirs = pipe(text, top_k=7)
        for mine, other in zip(one["masks"], [theirs] if text.count(own) == 1 else theirs, strict=True):
            assert [m["token"] for m in mine] == [o["token"] for o in other]
            assert [m["token_str"] for m in mine] == [o["token_str"] for o in other]
            assert [m["score"] for m in mine] == pytest.approx([o["score"] for o in other], abs=1e-5)
        assert one["tokens"] == [mine[0]["token"] for mine in one["masks"]]
        again = run(masked, prompt=[text.replace(own, "[MASK]")], top=7).extra["results"][0]
        assert [m["score"] for m in again["masks"][0]] == pytest.approx(
            [m["score"] for m in one["masks"][0]], abs=1e-6
        )


def test_what_cannot_be_filled_is_named(masked: str, make: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"prompt 2 has no mask: write \[MASK\]"):
        run(masked, prompt=["a [MASK]", "a fox"])
    with pytest.raises(
        DataError, match=rf"prompt 1 has 10\d tokens with the special ones, and the model reads {LENGTH}"
    ):
        run(masked, prompt=["." * 100 + " [MASK]"])
    with pytest.raises(UsageError, match="--max-new-tokens is for models that do"):
        run(masked, prompt=["a [MASK]"], max_new_tokens=3)
    (tmp_path / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "[MASK]"}]}')
    with pytest.raises(DataError, match=r"chats.jsonl, line 1 is a chat"):
        run(masked, file=tmp_path / "chats.jsonl")
    with pytest.raises(UsageError, match="--top is for models that guess"):
        run(make(tmp_path / "writer"), prompt=["a"], top=3)


def test_a_tokenizer_without_a_mask_and_a_model_without_words(masked: str, tmp_path: Path) -> None:
    tokenizer = folders.load(masked)[1]
    assert tokenizer is not None
    with pytest.raises(ModelError, match="names no mask token"):
        Masks(Tokenizer(tokenizer._backend, Specials(bos=tokenizer.bos_id, eos=tokenizer.eos_id)))
    shape = json.loads((Path(masked) / "config.json").read_text())
    shape["architectures"] = [shape["architectures"][0].replace("MaskedLM", "TokenClassification")]
    reads = transformers.AutoModelForTokenClassification.from_config(
        transformers.AutoConfig.for_model(**shape)
    )
    reads.save_pretrained(tmp_path / "tags")
    tokenizer.save(tmp_path / "tags")
    with pytest.raises(ModelError, match="writes no text: langmill tag uses such a model"):
        run(str(tmp_path / "tags"), prompt=["[MASK]"])


def test_the_filled_text_is_the_text_with_words_in_it(masked: str) -> None:
    tokenizer = folders.load(masked)[1]
    assert tokenizer is not None
    masks, vocab = Masks(tokenizer), tokenizer.vocab
    if "##" in "".join(vocab):
        word, part = vocab["fox"], vocab["##s"]
        assert masks.filled("Der [MASK], 春[MASK]晓", [word, word]) == "Der fox, 春fox晓"
        assert masks.filled("two fox [MASK]!", [part]) == "two foxs!"
        assert masks.filled("two[MASK] [MASK][MASK] a", [word, word, word]) == "two fox fox fox a"
    else:
        spaced, bare = tokenizer.encode(" fox")[0], vocab["s"]
        word = tokenizer.decode([spaced])
        assert word[0] == " " and len(word) > 1
        assert masks.filled("The <|mask|>, or[MASK]", [spaced, spaced]) == f"The{word}, or{word}"
        assert masks.filled("[MASK] fox [MASK]!", [spaced, bare]) == f"{word[1:]} foxs!"


def test_the_command_line(masked: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["generate", masked, "The [MASK] fox", "--top", "2"]) == 0
    filled, listed = capsys.readouterr().out.splitlines()
    assert "[MASK]" not in filled and filled.endswith(" fox") and len(listed.split(", ")) == 2
    assert cli.run(["generate", masked, "The [MASK] fox", "[MASK]", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["counts"]["masks"] == 2 and len(found["results"][1]["masks"][0]) == 5
