"""The quality rules for Chinese and Japanese, where counts of words between spaces mean nothing.

The same rules, with each Han character and kana as a word of its own and other scripts' words as they are. An English
word is about 1.6 Chinese characters, so lengths and n-grams are those of rules.py and repetition.py times 1.6,
rounded; stop words are the most frequent characters. They judge texts of whose words a third are such characters.

Of Japanese (LibreOffice's help, descriptions of Debian's packages, 200 characters and more) they keep, rule by rule,
82 to 97 % (repetition), 98 % and more (quality), 54 to 98 % (C4: descriptions have few sentences), 84 to 95 %
(FineWeb), and of lists of titles nothing. All together keep 52 % of the Japanese descriptions; the English rules, lines
joined, 42 % of the English ones.
"""

from __future__ import annotations

from langmill.data.c4 import C4, ENDS
from langmill.data.repetition import GopherRepetition
from langmill.data.rules import FineWeb, GopherQuality

STOP_CHARACTERS = tuple("的是了在不一有和这這人我中のにはをたがでと")

CJK_QUALITY = GopherQuality(
    min_words=80,
    max_words=160_000,
    min_word_length=None,  # a character is one
    max_word_length=5.0,  # mean: more is mostly another script, or no words
    max_signs=0.06,
    min_with_letters=0.7,  # prose has 7 to 20 % punctuation, each sign a word
    stop_words=STOP_CHARACTERS,
    language=None,
    single=True,
    name="cjk_quality",
)
CJK_REPETITION = GopherRepetition(
    top=((3, 0.20), (5, 0.18), (6, 0.16)),
    duplicate=((8, 0.15), (10, 0.14), (11, 0.13), (13, 0.12), (14, 0.11), (16, 0.10)),
    single=True,
    name="cjk_repetition",
)
CJK_C4 = C4(
    ends=(*ENDS, *"。！？；…”’」』）"),  # quotations and asides end with their closing sign
    min_sentences=3,  # a Chinese sentence holds what two English ones do
    min_words=5,
    policies=(),
    single=True,
    name="cjk_c4",
)
CJK_FINEWEB = FineWeb(short_line=10, max_line_breaks=0.2, single=True, name="cjk_fineweb")
