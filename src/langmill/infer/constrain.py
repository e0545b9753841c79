"""What a request may write: JSON of a schema, a pattern, one of several texts, or what a grammar says; by llguidance.

Masks come from the grammar's state before each token, so that whatever is drawn fits. So that the limit of tokens cuts
nothing off, a way to an end is known at all times: a token that leaves no such way in the tokens that remain is
replaced by the first one of the way that was known before it (`Grammatical.steer`).
"""

from __future__ import annotations

import itertools
import json
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from langmill.common.errors import MissingExtra, ModelError, UsageError
from langmill.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Ids = NDArray[np.int64]
BLANKS = r"\x20|\x0A\x20{0,16}"  # between the parts of a JSON text: nobody can write blanks for ever
KEPT = 64  # grammars whose tables are kept for the next request with the same one
TRIED = 128  # states that a search for an end looks at, beside two for each token that it may have
AHEAD = 8  # tokens to be read with the one before where the text is certain
LONG = 512  # tokens of a way that is looked for at first
FEW = 64  # ids of which a search tries all
CLOSE, OPEN = frozenset('"}])>'), frozenset("[{(<,;:")


class Grammars:
    """Constraints for the texts of one tokenizer; made once, for many requests and threads.

    vocab: the ids that the model's logits have. Each call makes a constraint for one request, and a UsageError says
    what is wrong with a schema, pattern or grammar, or that nothing meets it. MissingExtra without llguidance;
    ModelError for a tokenizer whose tokens stand for no text of their own.
    """

    def __init__(self, tokenizer: Tokenizer, vocab: int) -> None:
        try:
            import llguidance
        except ImportError:
            raise MissingExtra("structured", "llguidance") from None
        self._lib = llguidance
        self._tokens = _tokens(tokenizer, max(vocab, tokenizer.vocab_size))
        self._order = Order(tokenizer, max(vocab, tokenizer.vocab_size))
        self._kept: OrderedDict[str, tuple[LLMatcher, list[int] | None]] = OrderedDict()
        self._lock = threading.Lock()

    def json_schema(self, schema: dict[str, Any] | bool | str) -> Grammatical:
        """A JSON text that the schema allows, as JSON or already read; `True` or `{}` for any. A keyword that cannot be
        held to is an error."""
        try:
            read = json.loads(schema) if isinstance(schema, str) else schema
        except ValueError as error:
            raise UsageError(f"the schema is no JSON: {error}") from None
        if not isinstance(read, dict | bool):
            raise UsageError(
                f"the schema is {_short(json.dumps(read))}: a schema is an object, or true or false"
            )
        if read is False:
            raise UsageError("the schema is false: no JSON meets it")
        try:
            made = self._lib.LLMatcher.grammar_from_json_schema(
                {} if read is True else read, overrides={"whitespace_pattern": BLANKS}
            )
        except (ValueError, TypeError) as error:
            raise UsageError(f"the schema cannot be used: {error}") from None
        return self._made("schema", made)

    def regex(self, pattern: str) -> Grammatical:
        """A text that the whole pattern matches, in the syntax of Rust's `regex`: it has no look-around."""
        return self._made("pattern", self._lib.LLMatcher.grammar_from_regex(pattern))

    def choice(self, texts: Sequence[str]) -> Grammatical:
        """One of the texts."""
        if isinstance(texts, str) or not texts:
            raise UsageError("there is nothing to choose from: give a list of at least one text")
        return self._made("list of choices", "start: " + " | ".join(map(json.dumps, texts)))

    def grammar(self, lark: str) -> Grammatical:
        """A text of a grammar in Lark's notation, from its rule `start` on."""
        return self._made("grammar", self._lib.LLMatcher.grammar_from_lark(lark))

    def _made(self, what: str, grammar: str) -> Grammatical:
        with self._lock:
            kept = self._kept.pop(grammar, None) or self._first(what, grammar)
            self._kept[grammar] = kept
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            return Grammatical(kept[0].deep_copy(), self._order, kept[1])

    def _first(self, what: str, grammar: str) -> tuple[LLMatcher, list[int] | None]:
        """The start of a grammar, with tables that its copies share, and a way from there to an end."""
        first = self._lib.LLMatcher(self._tokens, grammar, log_level=0)
        if first.is_error():
            raise UsageError(f"the {what} cannot be used: {first.get_error().strip()}")
        mask = first.compute_bitmask()
        first.compute_ff_tokens()  # fails where the grammar has no end
        if first.is_error() and not _dead(first):
            raise UsageError(f"the {what} cannot be used: {_line(first)}")
        way = search(first, LONG, self._order) if any(mask) else None
        if way is None and self._order.hopeless(first):
            raise UsageError(f"the {what} cannot be used: no text meets it")
        return first, way


class Grammatical:
    """A `Constraint`: where one request stands in its grammar. Made by `Grammars`.

    Guarantee: once a way to an end is known that fits in the tokens left, the text ends complete. Searches for one are
    bounded, so that there may be a way and none be known. Then tokens are written freely, and the engine tells that
    the text was cut off if it comes to that.
    """

    def __init__(self, matcher: LLMatcher, order: Order, way: list[int] | None) -> None:
        self._matcher, self._order = matcher, order
        self._way = way  # from here to an end
        self._found = way or []  # by the last search
        self._behind: tuple[int, list[int]] | None = None  # an id that may come next, and the way behind it
        self._ahead: list[int] | None = None  # what must come next, where it was asked for
        self._failed = self._idle = 0  # searches in a row; tokens until the next one

    @property
    def done(self) -> bool:
        """Whether the text is complete and nothing can follow."""
        return self._matcher.is_stopped() and self.whole

    @property
    def whole(self) -> bool:
        """Whether the text is complete as it stands."""
        return self._matcher.is_accepting()

    def mask(self) -> NDArray[np.int32]:
        """A bit an id that may come next, 32 in an integer."""
        if self._matcher.is_stopped() and not self.whole:
            raise self._failure()
        packed = np.frombuffer(self._matcher.compute_bitmask(), np.int32)
        if self._matcher.is_error():
            raise self._failure()
        return packed

    def allows(self, id: int) -> bool:
        """Whether this id may come next."""
        certain = self._certain()
        if certain:  # then the mask leaves the usual token, and no other way to write the same
            return id == certain[0]
        return id < self._order.known and self._matcher.validate_tokens([id]) == 1

    def steer(self, id: int, left: int) -> int:
        """This id where the text can be complete within `left` tokens, this one included; else one on a way there."""
        known = self._way is not None and len(self._way) <= left
        if self._idle and not known:
            self._idle -= 1
            return id
        rest = self._rest(id, left - 1)
        if rest is not None:
            self._behind, self._failed = (id, rest), 0
            return id
        if not known:
            self._way = search(self._matcher, left, self._order)
            if self._way is None:
                self._failed += 1
                self._idle = min(1 << self._failed, 64)
                return id
        return self._way[0] if self._way else self._order.end

    def accept(self, id: int) -> None:
        """This id came next. ValueError where it may not."""
        if self._behind is not None and self._behind[0] == id:
            self._way = self._behind[1]
        else:
            self._way = self._way[1:] if self._way and self._way[0] == id else None
        self._behind = self._ahead = None
        if not self._matcher.consume_token(id):
            raise self._failure()

    def forced(self) -> list[int]:
        """The usual tokens of the text that must come next, up to AHEAD of them."""
        return self._certain()[:AHEAD]

    def _certain(self) -> list[int]:
        if self._ahead is None:
            self._ahead = [] if self._matcher.is_stopped() else self._matcher.compute_ff_tokens()
        return self._ahead

    def _failure(self) -> ValueError:
        if _dead(self._matcher):
            return ValueError(
                "the grammar has come to a dead end: nothing can follow, and the text is not complete"
            )
        return ValueError(_line(self._matcher))

    def _rest(self, id: int, most: int) -> list[int] | None:
        """A way of at most `most` ids behind this one: what is left of one that was known, or a new one."""
        way = self._way or []
        way = way[1:] if way[:1] == [id] else way
        rest = _tail(self._matcher, way, most, self._order.end, [id])
        if rest is None:
            state = self._matcher.deep_copy()
            if not state.consume_token(id):
                return None
            rest = search(state, most, self._order, self._found)
            self._found = rest or self._found
        return rest


def search(start: LLMatcher, most: int, order: Order, known: Sequence[int] = ()) -> list[int] | None:
    """At most `most` ids from a state of a grammar to an end; None where none were found. known: a way from a state
    before, which the end of this one may be like."""
    way = _tail(start, known, most, order.end)
    if way is not None:
        return way
    wide = 2 * most + 32
    way = _walk(start, wide, order, known) or _walk(start, wide, order, known, rounds=True)
    if way is not None:
        way = _shorter(start, way, order.end)
        if len(way) > most:
            way = _walk(start, most, order)
    return way


def _tail(
    state: LLMatcher, way: Sequence[int], most: int, end: int, first: Sequence[int] = ()
) -> list[int] | None:
    """The longest end of a way, of at most `most` ids, that leads to an end from here too, or from behind `first`."""
    for at in range(max(0, len(way) - most), len(way) + 1):
        if _ends(state, [*first, *way[at:]], end):
            return list(way[at:])
    return None


def _shorter(start: LLMatcher, way: list[int], end: int) -> list[int]:
    """The way without the tokens that it does not need."""
    for at in reversed(range(len(way))):
        less = way[:at] + way[at + 1 :]
        if _ends(start, less, end):
            way = less
    return way


def _walk(
    start: LLMatcher, bound: int, order: Order, known: Sequence[int] = (), rounds: bool = False
) -> list[int] | None:
    """Depth first, signs that close first. A place is known by its mask: what led from it to itself, or, with `rounds`,
    all that led from it back to it, is chosen less often from then on."""
    worn: Counter[tuple[int, int]] = Counter()
    place, options = order.options(start)
    ids, states, places, open_ = list[int](), [start], [place], [iter(options)]
    for _ in range(TRIED + 2 * bound):
        id = next(open_[-1], None) if len(ids) < bound else None
        if id is None:
            if not ids:
                return None
            for stack in (ids, states, places, open_):
                stack.pop()
            continue
        state = states[-1].deep_copy()
        if not state.consume_token(id):
            continue
        ids.append(id)
        rest = _tail(state, known, bound, order.end)
        if rest is not None:
            return ids + rest
        place, options = order.options(state)
        if place in (places if rounds else places[-1:]):
            since = len(places) - 1 - places[::-1].index(place)
            worn.update(zip(places[since:], ids[since:], strict=True))
        options.sort(key=lambda option: worn[place, option])
        states.append(state)
        places.append(place)
        open_.append(iter(options))
    return None


def _ends(state: LLMatcher, ids: Sequence[int], end: int) -> bool:
    """Whether these ids lead to an end."""
    if not ids:
        return state.is_accepting()
    return state.validate_tokens([*ids, end]) == len(ids) + 1


class Order:
    """A vocabulary in the order in which tokens are tried on the way to an end: quotes, brackets, digits, letters,
    others, what opens or goes on with something, and blanks; the longest first in each of these `groups`.

    end: an id that ends a text. known: ids that have a text, or mean something.
    """

    def __init__(self, tokenizer: Tokenizer, vocab: int) -> None:
        self.end, self.known = min(tokenizer.stop_ids), tokenizer.vocab_size
        groups: list[list[tuple[int, int]]] = [[] for _ in range(7)]
        bytes_of = _speller(tokenizer)
        for id in range(vocab):
            text = bytes_of(id).decode("utf-8", "replace")
            signs = set(text)
            if text.isspace():
                rank = 6
            elif signs <= CLOSE:
                rank = 0 if text.startswith('"') else 1
            elif signs & OPEN:
                rank = 5
            else:
                rank = 2 if text.isdecimal() else 3 if text.isalpha() else 4
            if text:
                groups[rank].append((-len(text), id))
        self._ids = np.array([id for group in groups for _, id in sorted(group)], np.int64)
        self._cuts = [0, *np.cumsum([len(group) for group in groups]).tolist()]

    def hopeless(self, start: LLMatcher) -> bool:
        """Whether every path from here is short and narrow, and a dead end."""
        states = [start]
        for _ in range(TRIED):
            if not states:
                return True
            state = states.pop()
            flags = np.unpackbits(np.frombuffer(state.compute_bitmask(), np.uint8))
            if state.is_stopped() and not state.is_accepting():
                continue
            if state.is_accepting() or flags.sum() > FEW:
                return False
            for id in self.options(state)[1]:
                behind = state.deep_copy()
                if behind.consume_token(id):
                    states.append(behind)
        return False

    def options(self, state: LLMatcher) -> tuple[int, list[int]]:
        """What the ids that may come next have in common with no other place, most likely, and what to try of them."""
        mask = state.compute_bitmask()
        flags = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little").view(np.bool_)
        allowed = flags[self._ids]
        if np.count_nonzero(allowed) <= FEW:
            return hash(mask), self._ids[allowed].tolist()
        found = []
        for start, end in itertools.pairwise(self._cuts):
            first = start + int(allowed[start:end].argmax()) if start < end else end
            found += [int(self._ids[at]) for at in range(first, min(first + 2, end)) if allowed[at]]
        return hash(mask), found


def _dead(matcher: LLMatcher) -> bool:
    """Whether nothing can follow though the text is not complete."""
    return "NoExtension" in matcher.stop_reason() + _line(matcher)


def _line(matcher: LLMatcher) -> str:
    """What went wrong, without the state that it went wrong in."""
    return matcher.get_error().partition("\n")[0]


def _speller(tokenizer: Tokenizer) -> Callable[[int], bytes]:
    """Of an id, the bytes that it adds to a text."""
    spelling, specials = tokenizer.spelling, tokenizer.special_ids

    def bytes_of(id: int) -> bytes:
        token = tokenizer.token(id)
        if token is None or id in specials:
            return b""
        return spelling.bytes_of(token) if spelling else token.replace("\u2581", " ").encode("utf-8")

    return bytes_of


class _Spelt:
    """A byte-level tokenizer, as llguidance's TokenizerWrapper takes it: the bytes of each token are ours."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        bytes_of = _speller(tokenizer)
        self.eos_token_id, self.bos_token_id = min(tokenizer.stop_ids), tokenizer.bos_id
        self.tokens = [bytes_of(id) for id in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_ids)
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)


def _tokens(tokenizer: Tokenizer, vocab: int) -> LLTokenizer:
    from llguidance import LLTokenizer, TokenizerWrapper

    ends = sorted(tokenizer.stop_ids)
    if not ends:
        raise ModelError(
            "this tokenizer names no token that ends a text, which constraints need: name its eos_token"
        )
    source = TokenizerWrapper(_Spelt(tokenizer)) if tokenizer.spelling else tokenizer.to_json()
    try:
        return LLTokenizer(source, n_vocab=vocab, eos_token=ends)
    except Exception as error:  # the library raises ValueError and its own
        raise ModelError(f"constraints cannot read this tokenizer: {error}") from None


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "…"
