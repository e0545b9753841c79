"""The tokenizer of a model folder: its tokenizer.json, or the older files of BERT's, RoBERTa's, GPT-2's, T5's and
Marian's kinds.

A vocab.txt alone is WordPiece (Devlin et al. 2018), a vocab.json with merges.txt byte-level BPE (Radford et al. 2019);
spiece.model holds SentencePiece's pieces, as do source.spm and target.spm, a list for each language over the ids of one
vocab.json. What stands around a text is what the classes of transformers of those names put there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from langmill.common.errors import ModelError
from langmill.families import sentencepiece
from langmill.families.folder import read_config
from langmill.families.hub import resolve
from langmill.text.specials import read_specials
from langmill.text.tokenizer import SENTINELS, Tokenizer

CLASSES = {  # the kind that each of transformers' classes makes
    "BertTokenizer": "bert",
    "DistilBertTokenizer": "bert",
    "RobertaTokenizer": "roberta",
    "BartTokenizer": "roberta",
    "GPT2Tokenizer": "gpt2",
    "T5Tokenizer": "t5",
    "MT5Tokenizer": "t5",
    "MarianTokenizer": "marian",
}
KINDS = {
    "bert": "bert", "distilbert": "bert", "roberta": "roberta", "bart": "roberta", "gpt2": "gpt2", "t5": "t5",
    "mt5": "t5", "marian": "marian",
}  # fmt: skip
FILES = {
    "bert": ("vocab.txt",),
    "roberta": ("vocab.json", "merges.txt"),
    "gpt2": ("vocab.json", "merges.txt"),
    "t5": ("spiece.model",),
    "marian": ("source.spm", "target.spm", "vocab.json"),
}
NAMES = {  # the special tokens of each kind, where the folder does not name them; the first ones must be there
    "bert": {"unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "mask": "[MASK]"},
    "roberta": {
        "cls": "<s>", "sep": "</s>", "bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<pad>", "mask": "<mask>",
    },
    "gpt2": {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>"},
    "t5": {"eos": "</s>", "unk": "<unk>", "pad": "<pad>"},
    "marian": {"eos": "</s>", "unk": "<unk>", "pad": "<pad>"},
}  # fmt: skip
NEEDED = {"bert": 3, "roberta": 2, "gpt2": 0, "t5": 2, "marian": 2}
LANGUAGE = re.compile(r">>\S+<<")  # Marian's mark, before a text, of the language to translate into


def tokenizer_of(folder: Path) -> Tokenizer | None:
    """The tokenizer of a model folder, None where it holds none that is known.

    ModelError names the file that is damaged, and a token of the folder's that its vocabulary lacks.
    """
    if (folder / "tokenizer.json").exists():
        return Tokenizer.load(folder)
    kind = _kind(folder)
    if kind is None or not all((folder / name).is_file() for name in FILES[kind]):
        return None
    named = _json(folder, "special_tokens_map.json") | _json(folder, "tokenizer_config.json")
    try:
        made = [_finished(backend, kind, folder, named) for backend in _backends(kind, folder, named)]
        specials = read_specials(made[0], folder)
        if len(made) > 1:
            specials = replace(specials, target=Tokenizer(made[1], specials))
        return Tokenizer(made[0], specials)
    except ModelError as error:
        text = str(error)
        raise ModelError(
            text if text.startswith(str(folder)) else f"{folder / FILES[kind][0]}: {text}"
        ) from None


def missing(where: str | Path) -> str:
    """What to tell a user whose model at `where` came without a tokenizer, and what to do."""
    folder = resolve(where)
    files = FILES.get(_kind(folder) or "", ())
    lost = [name for name in files if not (folder / name).is_file()]
    if len(lost) < len(files):
        return f"{where} has no tokenizer.json, and of {', '.join(files)} it lacks {', '.join(lost)}: fetch it again"
    if found := sorted([*folder.glob("*.model"), *folder.glob("vocab.*")]):
        return (
            f"{where} has no tokenizer.json but {found[0].name}, which is not read here. Where transformers and "
            f'sentencepiece are installed, make one: python -c "from transformers import AutoTokenizer as T; '
            f"T.from_pretrained('{where}').save_pretrained('{where}')\""
        )
    return f"{where} has no tokenizer.json: put the one that the model was trained with into the folder"


def _kind(folder: Path) -> str | None:
    """Which kind a folder's files are, by the class that it names, else by the model's type."""
    config = _json(folder, "config.json")
    named = _json(folder, "tokenizer_config.json").get("tokenizer_class") or config.get("tokenizer_class")
    if named is None:
        return KINDS.get(str(config.get("model_type")))
    return CLASSES.get(str(named).removesuffix("Fast"))


def _backends(kind: str, folder: Path, named: Mapping[str, Any]) -> list[Backend]:
    """What cuts texts into the entries of the vocabulary; for Marian that of each language."""
    makers = {"bert": _word_pieces, "t5": _pieces, "marian": _two_languages}
    try:
        return makers.get(kind, _byte_level)(folder, named)
    except ModelError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise ModelError(f"it cannot be read: {error}") from None


def _finished(backend: Backend, kind: str, folder: Path, named: Mapping[str, Any]) -> Backend:
    """The same with the special tokens, those that were added, and what stands around a text."""
    tokens = _tokens(named, kind)
    for name in list(tokens)[: NEEDED[kind]]:
        if tokens[name] is None or backend.token_to_id(str(tokens[name])) is None:
            raise ModelError(
                f"the {name}_token is {tokens[name]!r}, which is not one of the {backend.get_vocab_size()} entries: "
                "name the right one in tokenizer_config.json"
            )
    for id, added in _added(folder, named, set(tokens.values())):
        backend.add_tokens([added])
        if (found := backend.token_to_id(added.content)) != id:
            raise ModelError(
                f"the added token {added.content!r} has the id {id}, but the vocabulary would give it {found}: fetch "
                "the files again"
            )
    for name, token in tokens.items():
        if token is not None and backend.token_to_id(token) is not None:
            # a blank before the mask belongs to it
            lstrip = kind == "roberta" and name == "mask"
            backend.add_tokens([AddedToken(token, lstrip=lstrip, normalized=False, special=True)])
    if kind in ("t5", "marian"):
        eos = str(tokens["eos"])
        backend.post_processor = processors.TemplateProcessing(
            f"$A {eos}",
            f"$A {eos} $B {eos}" if kind == "t5" else f"$A $B {eos}",
            [(eos, backend.token_to_id(eos))],
        )
    elif kind != "gpt2":
        ids = backend.get_vocab()
        sep, cls = ((str(tokens[name]), ids[str(tokens[name])]) for name in ("sep", "cls"))
        blank = _flag(named, "add_prefix_space", False)
        backend.post_processor = (
            processors.BertProcessing(sep, cls)
            if kind == "bert"
            else processors.RobertaProcessing(sep, cls, add_prefix_space=blank)
        )
    return backend


def _word_pieces(folder: Path, named: Mapping[str, Any]) -> list[Backend]:
    entries = models.WordPiece.read_file(str(folder / "vocab.txt"))
    unknown = _token(named, "unk", NAMES["bert"]["unk"])
    backend = Backend(models.WordPiece(entries, unk_token=str(unknown)))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=_flag(named, "tokenize_chinese_chars", True),
        strip_accents=_flag(named, "strip_accents", None),
        lowercase=_flag(named, "do_lower_case", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    return [backend]


def _byte_level(folder: Path, named: Mapping[str, Any]) -> list[Backend]:
    entries, merges = models.BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    backend = Backend(models.BPE(entries, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=_flag(named, "add_prefix_space", False))
    backend.decoder = decoders.ByteLevel()
    return [backend]


def _pieces(folder: Path, named: Mapping[str, Any]) -> list[Backend]:
    """T5's: behind the pieces stand the marks of what was taken out of a text, the first one last."""
    own, number = sentencepiece.read(folder / "spiece.model"), named.get("extra_ids", 100)
    if type(number) is not int or not 0 <= number <= 1000:
        raise ModelError(
            f"tokenizer_config.json: extra_ids is {number!r}; a number from 0 to 1,000 is needed"
        )
    marks = [SENTINELS[0].format(place) for place in reversed(range(number))]
    tokens = _tokens(named, "t5")
    backend = sentencepiece.unigram(own, [*own.pieces, *marks], {*tokens.values(), *marks}, tokens["unk"])
    backend.add_special_tokens([AddedToken(mark, normalized=False, special=True) for mark in marks])
    return [backend]


def _two_languages(folder: Path, named: Mapping[str, Any]) -> list[Backend]:
    """Marian's: that of the language translated from, and that of the one translated to."""
    if named.get("separate_vocabs"):
        raise ModelError("separate_vocabs is true: a vocabulary for each language is not read here")
    vocab = _json(folder, "vocab.json")
    entries = sorted(vocab, key=lambda piece: vocab[piece] if type(vocab[piece]) is int else -1)
    if [vocab[piece] for piece in entries] != list(range(len(vocab))):
        raise ModelError(
            f"{folder / 'vocab.json'}: the ids are not those from 0 on, each once: fetch it again"
        )
    codes = [piece for piece in entries if LANGUAGE.fullmatch(piece)]
    tokens, made = _tokens(named, "marian"), []
    for file in FILES["marian"][:2]:
        own = sentencepiece.read(folder / file)
        made.append(sentencepiece.unigram(own, entries, {*tokens.values(), *codes}, tokens["unk"]))
        made[-1].add_tokens([AddedToken(code, normalized=False) for code in codes])
    return made


def _added(
    folder: Path, named: Mapping[str, Any], special: set[str | None]
) -> Iterator[tuple[int, AddedToken]]:
    """The tokens that were added behind the vocabulary, in the order of their ids."""
    listed = named.get("added_tokens_decoder")
    if isinstance(listed, Mapping):
        found = [
            (id, token if isinstance(token, Mapping) else {"content": token}) for id, token in listed.items()
        ]
    else:
        found = [(id, {"content": token}) for token, id in _json(folder, "added_tokens.json").items()]
    if not all(str(id).isdecimal() and isinstance(token.get("content"), str) for id, token in found):
        raise ModelError("the folder's added tokens are not a table of texts and ids")
    for id, token in sorted(found, key=lambda pair: int(pair[0])):
        control = bool(token.get("special", token["content"] in special))
        flags = {name: bool(token.get(name, False)) for name in ("single_word", "lstrip", "rstrip")}
        normalized = bool(token.get("normalized", not control))
        yield int(id), AddedToken(token["content"], normalized=normalized, special=control, **flags)


def _tokens(named: Mapping[str, Any], kind: str) -> dict[str, str | None]:
    """The special tokens of a kind as the folder names them, by their use."""
    return {name: _token(named, name, usual) for name, usual in NAMES[kind].items()}


def _token(named: Mapping[str, Any], name: str, usual: str) -> str | None:
    """A special token as the folder names it."""
    given = named.get(f"{name}_token", usual)
    content = given.get("content") if isinstance(given, Mapping) else given
    if not isinstance(content, str | None):
        raise ModelError(f"the folder's {name}_token is {given!r}, not a token")
    return content


def _flag(named: Mapping[str, Any], key: str, usual: bool | None) -> Any:
    given = named.get(key, usual)
    if not isinstance(given, bool | None):
        raise ModelError(f"tokenizer_config.json: {key} is {given!r}; true or false is needed")
    return usual if given is None else given


def _json(folder: Path, name: str) -> dict[str, Any]:
    return read_config(folder / name) if (folder / name).is_file() else {}
