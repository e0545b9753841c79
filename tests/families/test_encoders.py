"""Encoders and encoder-decoders against transformers, through files that save_pretrained wrote."""

from __future__ import annotations

import json
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

READERS = {
    name: shape
    for kind in ("bert", "roberta", "distilbert")
    for name, shape in family(kind, "test").TINY.items()
}
WRITERS = {name: shape for kind in ("bart", "t5") for name, shape in family(kind, "test").TINY.items()}
HEADS = {
    "text": transformers.AutoModelForMaskedLM,
    "classify": transformers.AutoModelForSequenceClassification,
    "tag": transformers.AutoModelForTokenClassification,
    "answer": transformers.AutoModelForQuestionAnswering,
    "embed": transformers.AutoModel,
}


def reference(name: str, auto: Any, where: Path, **more: Any) -> Any:
    """transformers' model of random weights, saved by itself."""
    kind = name if name in ("xlm-roberta",) else name.split("-")[0]
    config = transformers.AutoConfig.for_model(kind, **(READERS | WRITERS)[name], **more)
    torch.manual_seed(0)
    model = auto.from_config(config).eval()
    for weight in model.parameters():  # biases and norms too, which start as 0 and 1
        if weight.requires_grad:  # Marian's sines are computed
            weight.data.normal_(1.0 if weight.dim() == 1 else 0.0, 0.1)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    model.save_pretrained(where)
    return model


def same_files(before: Path, after: Path) -> None:
    theirs, ours = (load_file(side / "model.safetensors") for side in (before, after))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)


def changed(where: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """The folder with its tensors changed."""
    file = where / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def settled(where: Path, **changes: Any) -> None:
    """The folder with its configuration changed."""
    file = where / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("task", HEADS)
@pytest.mark.parametrize("name", READERS)
@torch.no_grad()
def test_encoders_agree_with_transformers(name: str, task: str, tmp_path: Path) -> None:
    labels = {0: "ham", 1: "spam", 2: "[SEP]"}
    more = (
        {"id2label": labels, "label2id": {v: k for k, v in labels.items()}}
        if task in ("classify", "tag")
        else {}
    )
    theirs = reference(name, HEADS[task], tmp_path / "theirs", **more)
    ours = folder.load_model(tmp_path / "theirs")
    if more:
        assert ours.config.head.labels == ("ham", "spam", "[SEP]")
    rows, lengths = torch.randint(2, 97, (3, 20), generator=torch.Generator().manual_seed(1)), [20, 7, 1]
    inside = torch.arange(20)[None] < torch.tensor(lengths)[:, None]
    kinds = getattr(theirs.config, "type_vocab_size", 0) or 0
    types = (torch.arange(20) > 4).long().expand(3, -1).contiguous() if kinds > 1 else None
    given = {"token_type_ids": types} if types is not None else {}
    rows = torch.where(inside, rows, getattr(theirs.config, "pad_token_id", 0))
    out = theirs(rows, attention_mask=inside.long(), **given)
    found = ours(rows, documents_BT=inside.int(), types_BT=types)
    if task == "embed":
        hidden = ours.hidden(rows, documents_BT=inside.int(), types_BT=types)
        torch.testing.assert_close(hidden[inside], out.last_hidden_state[inside], atol=1e-5, rtol=0)
        if "pooler_output" in out and out.pooler_output is not None:
            torch.testing.assert_close(found, out.pooler_output, atol=1e-5, rtol=0)
    elif task == "answer":
        expected = torch.stack([out.start_logits, out.end_logits], dim=-1)
        torch.testing.assert_close(found[inside], expected[inside], atol=1e-5, rtol=0)
    else:
        expected = out.logits if task == "classify" else out.logits[inside]
        torch.testing.assert_close(
            found if task == "classify" else found[inside], expected, atol=1e-5, rtol=0
        )
    folder.save(ours, None, tmp_path / "ours")
    same_files(tmp_path / "theirs", tmp_path / "ours")
    again = HEADS[task].from_pretrained(tmp_path / "ours").eval()
    [written] = json.loads((tmp_path / "ours/config.json").read_text())["architectures"]
    assert written == theirs.config.architectures[0].removeprefix("XLM").replace("Camembert", "Roberta")
    second = again(rows, attention_mask=inside.long(), **given)
    for one, other in zip(out.to_tuple(), second.to_tuple(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", READERS)
@torch.no_grad()
def test_packed_documents_equal_documents_alone(name: str, tmp_path: Path) -> None:
    reference(name, HEADS["classify"], tmp_path)
    model = folder.load_model(tmp_path)
    parts = [torch.arange(3, 12), torch.arange(20, 21), torch.arange(30, 45)]
    row, documents = (
        torch.cat([*parts, torch.zeros(4).long()])[None],
        torch.tensor([[1] * 9 + [2] + [3] * 15 + [0] * 4]),
    )
    alone = torch.cat([model(part[None]) for part in parts])
    torch.testing.assert_close(model(row, documents_BT=documents), alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", WRITERS)
@torch.no_grad()
def test_encoder_decoders_agree_with_transformers(name: str, tmp_path: Path) -> None:
    theirs = reference(name, transformers.AutoModelForSeq2SeqLM, tmp_path / "theirs")
    ours = folder.load_model(tmp_path / "theirs")
    generator = torch.Generator().manual_seed(1)
    source = torch.randint(2, 97, (2, 30), generator=generator)
    target = torch.randint(2, 97, (2, 40), generator=generator)
    inside = torch.arange(30)[None] < torch.tensor([30, 11])[:, None]
    expected = theirs(source, attention_mask=inside.long(), decoder_input_ids=target).logits
    logits = ours(target, encoder_tokens=source, encoder_documents=inside.int())
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)

    memory, cache = ours.encode(source, inside.int()), ours.new_cache(2, 40)
    steps = [ours(target[:, :10], memory=memory, cache=cache)]
    steps += [ours(target[:, place : place + 1], memory=memory, cache=cache) for place in range(10, 40)]
    torch.testing.assert_close(torch.cat(steps, dim=1), logits, atol=1e-4, rtol=0)

    folder.save(ours, None, tmp_path / "ours")
    same_files(tmp_path / "theirs", tmp_path / "ours")
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours").eval()
    second = again(source, attention_mask=inside.long(), decoder_input_ids=target).logits
    torch.testing.assert_close(second, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", WRITERS)
@torch.no_grad()
def test_packed_pairs_equal_pairs_alone(name: str, tmp_path: Path) -> None:
    """Documents of the decoder's row read their own in the encoder's, whether all is split or masked."""
    reference(name, transformers.AutoModelForSeq2SeqLM, tmp_path)
    model = folder.load_model(tmp_path)
    pairs = [(torch.arange(3, 12), torch.arange(40, 44)), (torch.arange(20, 22), torch.arange(50, 61))]
    source, target = (torch.cat([*side, torch.zeros(3).long()])[None] for side in zip(*pairs, strict=True))
    reads, writes = torch.tensor([[1] * 9 + [2] * 2 + [0] * 3]), torch.tensor([[1] * 4 + [2] * 11 + [0] * 3])
    packed = model(target, documents_BT=writes, encoder_tokens=source, encoder_documents=reads)
    alone = torch.cat([model(t[None], encoder_tokens=s[None]) for s, t in pairs], dim=1)
    torch.testing.assert_close(packed[:, :15], alone, atol=1e-5, rtol=0)
    turned = torch.where(
        reads == 1, 2, torch.where(reads == 2, 1, 0)
    )  # other numbers: nothing pairs up in order
    wrong = model(target, documents_BT=writes, encoder_tokens=source, encoder_documents=turned)
    assert not torch.allclose(wrong[:, :15], alone, atol=1e-2)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@torch.no_grad()
def test_decoders_that_classify_agree_with_transformers(kind: str, tmp_path: Path) -> None:
    shape = family(kind, "test").TINY[kind]
    config = transformers.AutoConfig.for_model(kind, **shape, num_labels=3, pad_token_id=0)
    torch.manual_seed(0)
    theirs = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = folder.load_model(tmp_path / "theirs")
    rows, lengths = torch.randint(2, 97, (3, 20)), torch.tensor([20, 7, 1])
    inside = torch.arange(20)[None] < lengths[:, None]
    rows = torch.where(inside, rows, 0)
    expected = theirs(rows, attention_mask=inside.long()).logits
    torch.testing.assert_close(ours(rows, documents_BT=inside.int()), expected, atol=1e-5, rtol=0)
    folder.save(ours, None, tmp_path / "ours")
    same_files(tmp_path / "theirs", tmp_path / "ours")


@pytest.mark.parametrize("name", ["bart", "bart-scaled"])
@pytest.mark.parametrize("problem", ["classify", "multilabel", "regress"])
@torch.no_grad()
def test_a_bart_that_classifies_agrees_with_transformers(name: str, problem: str, tmp_path: Path) -> None:
    """It reads each text twice, and its score is of the last eos; alone, padded or packed."""
    kind = {"classify": "single_label_classification", "multilabel": "multi_label_classification"}
    more = {"num_labels": 1 if problem == "regress" else 3, "problem_type": kind.get(problem, "regression")}
    theirs = reference(name, HEADS["classify"], tmp_path / "theirs", **more)
    ours = folder.load_model(tmp_path / "theirs")
    assert ours.config.head.task == problem
    lengths, pad, eos = [20, 7, 2], theirs.config.pad_token_id, theirs.config.eos_token_id
    texts = [torch.cat([torch.randint(3, 97, (length - 1,)), torch.tensor([eos])]) for length in lengths]
    rows = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=pad)
    inside = torch.arange(20)[None] < torch.tensor(lengths)[:, None]
    expected = theirs(rows, attention_mask=inside.long()).logits
    torch.testing.assert_close(ours(rows, documents_BT=inside.int()), expected, atol=1e-5, rtol=0)
    alone = torch.cat([ours(text[None]) for text in texts])
    torch.testing.assert_close(alone, expected, atol=1e-5, rtol=0)
    packed = torch.cat([*texts, torch.tensor([pad, pad])])[None]
    documents = torch.tensor([[1] * 20 + [2] * 7 + [3] * 2 + [0] * 2])
    torch.testing.assert_close(ours(packed, documents_BT=documents), expected, atol=1e-5, rtol=0)
    folder.save(ours, None, tmp_path / "ours")
    same_files(tmp_path / "theirs", tmp_path / "ours")
    again = HEADS["classify"].from_pretrained(tmp_path / "ours").eval()
    assert type(again) is type(theirs)
    torch.testing.assert_close(again(rows, attention_mask=inside.long()).logits, expected, atol=1e-6, rtol=0)


def test_a_bart_that_answers_is_refused_by_name(tmp_path: Path) -> None:
    reference("bart", HEADS["answer"], tmp_path)
    with pytest.raises(
        ModelError, match="write and that classify are supported, not BartForQuestionAnswering"
    ):
        folder.load_model(tmp_path)


def test_a_whole_pretraining_file_loads(tmp_path: Path) -> None:
    """The hub's BERT files hold the pooler, next-sentence scores and the tied matrix once more."""
    theirs = reference("bert", transformers.AutoModelForMaskedLM, tmp_path)
    state = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for key, tensor in load_file(tmp_path / "model.safetensors").items()
    }
    state["bert.embeddings.position_ids"] = torch.arange(64)[None].float()
    state["bert.pooler.dense.weight"], state["bert.pooler.dense.bias"] = torch.ones(32, 32), torch.ones(32)
    state["cls.seq_relationship.weight"], state["cls.seq_relationship.bias"] = (
        torch.ones(2, 32),
        torch.ones(2),
    )
    state["cls.predictions.decoder.weight"] = state["bert.embeddings.word_embeddings.weight"].clone()
    state["cls.predictions.decoder.bias"] = state["cls.predictions.bias"].clone()
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tokens = torch.arange(9)[None]
    torch.testing.assert_close(folder.load_model(tmp_path)(tokens), theirs(tokens).logits, atol=1e-5, rtol=0)
    state["bert.embeddings.LayerNorm.weight"] = state["bert.embeddings.LayerNorm.gamma"].clone()
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"LayerNorm\.\w+ and bert\.embeddings\.LayerNorm\.\w+ are the same tensor"
    ):
        folder.load_model(tmp_path)


LEFT = {
    "bert": [
        "cls.predictions.bias",
        "cls.predictions.transform.dense.weight",
        "classifier.weight",
        "qa_outputs.bias",
    ],
    "roberta": ["lm_head.bias", "lm_head.layer_norm.weight", "classifier.out_proj.bias", "qa_outputs.weight"],
    "distilbert": [
        "vocab_projector.bias",
        "vocab_transform.weight",
        "pre_classifier.bias",
        "classifier.weight",
    ],
}


@pytest.mark.parametrize("name", LEFT)
@torch.no_grad()
def test_what_is_left_of_another_head_is_not_in_the_way(name: str, tmp_path: Path) -> None:
    theirs, tokens = reference(name, HEADS["embed"], tmp_path), torch.arange(4, 13)[None]
    changed(tmp_path, lambda state: state | {key: torch.ones(3) for key in LEFT[name]})
    expected = theirs(tokens).last_hidden_state
    torch.testing.assert_close(folder.load_model(tmp_path).hidden(tokens), expected, atol=1e-5, rtol=0)
    changed(tmp_path, lambda state: state | {"classifier.waste": torch.ones(3)})
    with pytest.raises(ModelError, match=r"classifier\.waste is not part"):
        folder.load_model(tmp_path)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
@torch.no_grad()
def test_a_tie_means_nothing_where_no_words_are_scored(name: str, tmp_path: Path) -> None:
    theirs, tokens = reference(name, HEADS["classify"], tmp_path), torch.arange(4, 13)[None]
    settled(tmp_path, tie_word_embeddings=False)
    torch.testing.assert_close(folder.load_model(tmp_path)(tokens), theirs(tokens).logits, atol=1e-5, rtol=0)
    settled(
        tmp_path, architectures=[theirs.config.architectures[0].replace("SequenceClassification", "MaskedLM")]
    )
    with pytest.raises(ModelError, match="tie_word_embeddings = False is not supported"):
        folder.load_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"problem_type": "regression"}, "'regression' with 2 numbers a text; supported is one"),
        ({"id2label": {"0": "ham", "1": "ham"}}, "gives the name 'ham' to two numbers"),
        (
            {"architectures": ["BertForQuestionAnswering"], "id2label": {str(i): str(i) for i in range(3)}},
            "BertForQuestionAnswering is announced with 3 scores a token",
        ),
        ({"architectures": ["BertForMultipleChoice"]}, "BertForMultipleChoice is not supported"),
        ({"id2label": {"0": "a", "2": "b"}}, "must number its labels from 0 to 1"),
        ({"problem_type": "ranking"}, "problem_type is 'ranking'"),
        ({"is_decoder": True}, "is_decoder = True is not supported"),
        ({"type_vocab_size": 3}, r"has shape \(2, 32\)"),
        ({"architectures": "BertModel"}, "not a list of names"),
        ({"id2label": {str(i): str(i) for i in range(5)}}, r"has shape \(2, 32\)"),
    ],
)
def test_a_damaged_configuration_is_refused_by_name(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    reference("bert", HEADS["classify"], tmp_path)
    settled(tmp_path, **changes)
    with pytest.raises(ModelError, match=message):
        folder.load_model(tmp_path)
