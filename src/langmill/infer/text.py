"""A row's ids on their way to text: whole characters only, and nothing from a stop text on."""

from __future__ import annotations

from collections.abc import Sequence

from langmill.text.tokenizer import Tokenizer


class Clip:
    """Passes text on up to the first stop text, holding back whatever may be the start of one.

    Of several stop texts the one that is complete first counts, so that the result does not depend on
    where the text was cut into pieces.
    """

    def __init__(self, stop: Sequence[str]):
        self.stop = stop
        self.held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that can be shown after `text` has arrived."""
        self.held += text
        ends = [(at + len(stop), at) for stop in self.stop if (at := self.held.find(stop)) >= 0]
        if ends:
            self.stopped = True
            shown, self.held = self.held[: min(ends)[1]], ""
            return shown
        keep = max((_overlap(self.held, stop) for stop in self.stop), default=0)
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return shown

    def flush(self) -> str:
        """What was held back, where nothing follows any more."""
        shown, self.held = self.held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


class Writer:
    """One row's text: `ended` takes its ids, which are no stop ids, and `take` gives what is certain by then."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.stream, self.clip = tokenizer.stream(), Clip(stop)
        self.ready = ""

    def ended(self, id: int) -> bool:
        """Whether a stop text is complete with this id."""
        self.ready += self.clip.push(self.stream.push(id))
        return self.clip.stopped

    def take(self, last: bool) -> str:
        """The text since the call before; with `last` also what was held back, since nothing follows."""
        text, self.ready = self.ready, ""
        if last and not self.clip.stopped:
            text += self.clip.push(self.stream.flush())
            text += self.clip.flush()
        return text
