"""Tokenizer: text to ids and back, over Hugging Face `tokenizers` and its file format.

Three rules hold everywhere. Text that a user wrote never turns into control tokens, even where it
spells one ("<|endoftext|>"); only a rendered chat template does (`encode_with_specials`). Nothing is
added around a text and nothing is cut off it, whatever the file's post-processor, padding or truncation
say. And streamed text is the same text: pieces never split a character and join to what `decode` gives.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from langmill.common.errors import DataError, ModelError, UsageError
from langmill.common.files import atomic_write
from langmill.text.frames import Frame, frame_of
from langmill.text.specials import BOUNDARIES, TURN_ENDS, Specials, read_specials, starts_with
from langmill.text.stream import Spelling, TextStream
from langmill.text.training import END, MASK, PAD, train_backend

if TYPE_CHECKING:
    from langmill.text.bulk import BulkEncoder

Place = tuple[int, int]
TARGET = "target_tokenizer.json"  # beside tokenizer.json: that of the language translated to
SENTINELS = ("<extra_id_{}>", "\u2581<extra_id_{}>")  # T5's marks of what was taken out of a text, and mT5's


class Tokenizer:
    """A vocabulary, its special ids and its chat template. Read-only, picklable, safe to share by threads.

    Build one with `train`, `load`, or from a `tokenizers.Tokenizer` and its `Specials`.
    """

    def __init__(self, backend: Backend, specials: Specials) -> None:
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = False
        self._backend = backend
        self.specials = specials
        self.vocab: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self.vocab.values(), default=-1) + 1
        self.special_ids = frozenset(
            id for id, token in backend.get_added_tokens_decoder().items() if token.special
        )
        named = (specials.bos, specials.eos, specials.pad, specials.mask)
        self.bos_id, self.eos_id, self.pad_id, self.mask_id = named
        self.chat_template = specials.chat_template
        known = [id for id in (*named, *specials.stops) if id is not None]
        if beyond := [id for id in known if not 0 <= id < self.vocab_size]:
            raise ModelError(f"special ids {beyond} lie outside the tokenizer's {self.vocab_size} entries")

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int | None = None,
        kind: str = "bpe",
        sample_bytes: int = 64 << 20,
        specials: Sequence[str] = (),
    ) -> Self:
        """Train on a sample of at most `sample_bytes`, spread evenly over all of `texts`.

        `kind` is bpe, wordpiece or unigram: all three are lossless on any text. `vocab_size` None is
        chosen from the text's size; a small text may not fill the one asked for (see `.vocab_size`).
        `specials`: control tokens beside the usual ones, such as training.MASK, SENTINEL's and FIM's.
        The same texts give a byte-identical tokenizer. DataError where there is no text.
        """
        backend = train_backend(texts, vocab_size, kind, sample_bytes, specials)
        end, pad, mask = (backend.token_to_id(token) for token in (END, PAD, MASK))
        return cls(backend, Specials(bos=end, eos=end, pad=pad, add_bos=True, mask=mask))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a tokenizer.json, or a folder with one; UsageError where there is none, ModelError names a bad file."""
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise UsageError(f"{file} does not exist: a tokenizer is a tokenizer.json or a folder with one")
        backend = _backend(file)
        folder = file.parent if file.name == "tokenizer.json" else None
        try:
            specials = read_specials(backend, folder)
            if folder is not None and (folder / TARGET).is_file():
                specials = replace(specials, target=cls(_backend(folder / TARGET), specials))
            return cls(backend, specials)
        except ModelError as error:
            raise ModelError(f"{file}: {error}") from None

    def save(self, folder: str | Path, length: int | None = None) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja, as transformers reads them, which cuts
        texts to `length` tokens, or to fewer where the tokenizer came with a number."""
        folder = Path(folder)
        atomic_write(folder / "tokenizer.json", self._backend.to_str(pretty=True))
        if self.target is not self:
            atomic_write(folder / TARGET, self.target._backend.to_str(pretty=True))
        config = dict(self.specials.config or {"clean_up_tokenization_spaces": False})
        for key, id in (("bos_token", self.bos_id), ("eos_token", self.eos_id), ("pad_token", self.pad_id)):
            config[key] = None if id is None else self._backend.id_to_token(id)
        if self.mask_id is not None:
            config["mask_token"] = self._backend.id_to_token(self.mask_id)
        if length is not None:
            config["model_max_length"] = min(length, config.get("model_max_length") or length)
        if self._takes_types:
            theirs = ["input_ids", "token_type_ids", "attention_mask"]
            bare = "DistilBert" in str(config.get("tokenizer_class"))  # its models take no types
            config.setdefault("model_input_names", theirs[::2] if bare else theirs)
        if self.specials.add_bos and not starts_with(self._backend, self.bos_id):
            config["add_bos_token"] = True
        # This class takes the file as it is; others rebuild parts of it and change ids.
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        text = json.dumps(config, ensure_ascii=False, indent=2, sort_keys=True)
        atomic_write(folder / "tokenizer_config.json", text + "\n")
        if self.chat_template is not None:
            atomic_write(folder / "chat_template.jinja", self.chat_template)

    @property
    def target(self) -> Tokenizer:
        """What cuts the texts that a translator learns to write: the same, but for Marian's models of two languages."""
        return self.specials.target or self

    @property
    def boundary_id(self) -> int:
        """The id that ends a document in pretraining: `<|endoftext|>` where it exists, else eos."""
        known = (self._backend.token_to_id(token) for token in BOUNDARIES)
        boundary = next((id for id in known if id is not None), self.eos_id)
        if boundary is None:
            raise ModelError("this tokenizer names no end-of-text token, which training on documents needs")
        return boundary

    @property
    def fill_id(self) -> int:
        """The id that fills rows, which nothing looks at: pad, or the boundary where there is none."""
        return self.boundary_id if self.pad_id is None else self.pad_id

    @property
    def start_id(self) -> int:
        """The id that stands before a document: bos where the tokenizer adds it, else the boundary."""
        return self.bos_id if self.specials.add_bos and self.bos_id is not None else self.boundary_id

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end generation: eos, those the model's folder names, the boundary, ends of turn."""
        known = [self._backend.token_to_id(token) for token in BOUNDARIES]
        if self.chat_template:
            known += [self._backend.token_to_id(token) for token in TURN_ENDS if token in self.chat_template]
        return self.specials.stops | {id for id in (*known, self.eos_id) if id is not None}

    @cached_property
    def frame(self) -> Frame:
        """What stands around a text, or two, that an encoder reads."""
        return frame_of(self)

    @cached_property
    def sentinel_ids(self) -> tuple[int, ...]:
        """The ids that stand for what was taken out of a text, the first one first: `<extra_id_0>` and so on."""
        found: list[int] = []
        for number in range(self.vocab_size):
            ids = (self.vocab.get(spelt.format(number)) for spelt in SENTINELS)
            if (id := next((id for id in ids if id is not None), None)) is None:
                break
            found.append(id)
        return tuple(found)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical tokenizer.json: equal for equal tokenizers, however they were saved."""
        both = [self.to_json(), *([] if self.target is self else [self.target.to_json()])]
        canonical = "".join(json.dumps(json.loads(one), sort_keys=True, ensure_ascii=False) for one in both)
        return hashlib.sha256(canonical.encode("utf-8")).hexdigest()

    def to_json(self) -> str:
        """The tokenizer.json."""
        text: str = self._backend.to_str()
        return text

    def token(self, id: int) -> str | None:
        """How the vocabulary spells an id; None where there is none."""
        token: str | None = self._backend.id_to_token(id)
        return token

    def with_template(self, template: str) -> Self:
        """The same tokenizer with another chat template."""
        return type(self)(self._backend, replace(self.specials, chat_template=template))

    def encode(self, text: str) -> list[int]:
        """The ids of a text, none added, and none of them a control token. DataError on a lone surrogate."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` for many texts, on all processors; see text/bulk.py for corpora."""
        if len(texts) == 1 and "_plain" not in self.__dict__ and self._is_clear(texts[0]):
            return _encode(self._backend, texts)
        return _encode(self._plain, texts)

    def prompt_ids(self, text: str) -> list[int]:
        """The ids of a text to go on from: `encode` after bos where the tokenizer adds it, never empty."""
        bos = [self.bos_id] if self.specials.add_bos and self.bos_id is not None else []
        return bos + self.encode(text) or [self.start_id]

    def encode_with_specials(self, text: str) -> list[int]:
        """Like `encode`, but special tokens spelt in the text become their ids: for rendered templates only."""
        return _encode(self._backend, [text])[0]

    def encode_with_offsets(self, text: str, specials: bool = False) -> tuple[list[int], list[Place]]:
        """The ids of a text and the characters, from and to, that each stands for; `specials` as above."""
        backend = self._backend if specials else self._plain
        try:  # `encode` would hold up all other threads
            [encoding] = backend.encode_batch([text], add_special_tokens=False)
        except (UnicodeEncodeError, TypeError) as error:
            raise DataError(f"the text holds half a surrogate pair and is no Unicode: {error}") from None
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int], skip_specials: bool = True) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_specials))

    def stream(self) -> TextStream:
        """A decoder that takes ids one at a time."""
        return TextStream(self)

    @cached_property
    def bulk(self) -> BulkEncoder:
        """The encoder for corpora, which keeps what it learnt about this tokenizer."""
        from langmill.text.bulk import BulkEncoder

        return BulkEncoder(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._backend, self.specials)

    @property
    def _takes_types(self) -> bool:
        """Whether two texts are told apart by types, as BERT's are; a file that is odd for two texts does not."""
        try:
            return self.frame.stated and 1 in self.frame.pair.types[-1]
        except ModelError:
            return False

    def _is_clear(self, text: str) -> bool:
        """Whether a text surely spells no special token, so that the instance for users' text, which takes long to
        make, is not needed."""
        added = [token for token in self._backend.get_added_tokens_decoder().values() if token.special]
        exact = type(self._backend.model).__name__ == "BPE" and not any(token.normalized for token in added)
        return exact and len(text) < 1 << 14 and not any(token.content in text for token in added)

    @cached_property
    def _plain(self) -> Backend:
        """The instance for users' text: it does not look for special tokens."""
        if isinstance(self._backend.model, BPE):
            backend = copy.deepcopy(self._backend)
            backend.encode_special_tokens = True
            return backend
        content = json.loads(self.to_json())
        model = content["model"]
        if model.get("type") in ("Unigram", "WordPiece", "WordLevel"):  # there it is a piece like any other
            for added in content["added_tokens"]:
                hidden = f"\U0010ffff{self.fingerprint}{added['id']}"
                if added["special"] and _respell(model, added["id"], added["content"], hidden):
                    added["content"] = hidden
        backend = Backend.from_str(json.dumps(content))
        backend.encode_special_tokens = True
        return backend

    @cached_property
    def spelling(self) -> Spelling | None:
        """How tokens spell bytes, for byte-level decoders; None for the others."""
        decoder = self._backend.decoder
        return Spelling.of({} if decoder is None else json.loads(decoder.__getstate__()))


def _encode(backend: Backend, texts: list[str]) -> list[list[int]]:
    try:
        return [row.ids for row in backend.encode_batch_fast(texts, add_special_tokens=False)]
    except TypeError:
        for text in texts:
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                place = f"character {error.start}, U+{ord(text[error.start]):04X}"
                why = f"a text holds half a surrogate pair ({place}): it is no valid text"
                raise DataError(why) from None
        raise


def _respell(model: dict[str, Any], id: int, token: str, hidden: str) -> bool:
    """Spell a model's entry as nobody does; whether there is such an entry."""
    vocab = model["vocab"]
    if isinstance(vocab, list):
        if id < len(vocab):
            vocab[id][0] = hidden
        return id < len(vocab)
    if vocab.get(token) != id:
        return False
    vocab[hidden] = vocab.pop(token)
    if model.get("unk_token") == token:
        model["unk_token"] = hidden
    return True


def _backend(file: Path) -> Backend:
    try:
        return Backend.from_str(file.read_bytes().decode("utf-8"))
    except Exception as error:  # the library raises plain Exception
        raise ModelError(f"{file} is not a tokenizer.json that can be read: {error}") from None
