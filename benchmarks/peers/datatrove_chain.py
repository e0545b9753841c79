"""datatrove's quality rules and deduplication: run by the peer's Python, with datatrove and spaCy installed.

python datatrove_chain.py verdicts TEXTS OUT
python datatrove_chain.py time TEXTS FOLDER

TEXTS is a JSON list. `verdicts` writes what each rule alone says of each text (`false`: dropped), what each filter
says ("" or its reason), and the text that the C4 filter leaves. `time` reads numbers from standard input: for each it
passes so many of the texts through the chain of filters, then drops exact copies and near duplicates of what was
kept, and prints a JSON object with the seconds of each and what was left.
"""

import hashlib
import json
import shutil
import sys
import time
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.dedup.minhash import (
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from loguru import logger

QUALITY = {
    "min_doc_words": 50,
    "max_doc_words": 100_000,
    "min_avg_word_length": 3,
    "max_avg_word_length": 10,
    "max_symbol_word_ratio": 0.1,
    "max_bullet_lines_ratio": 0.9,
    "max_ellipsis_lines_ratio": 0.3,
    "max_non_alpha_words_ratio": 0.8,
    "min_stop_words": 2,
}
REPETITION = {
    "dup_line_frac": 0.3,
    "dup_para_frac": 0.3,
    "dup_line_char_frac": 0.2,
    "dup_para_char_frac": 0.2,
}
TOP = ((2, 0.2), (3, 0.18), (4, 0.16))
DUPLICATES = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))
FINEWEB = {
    "line_punct_thr": 0.12,
    "short_line_thr": 0.67,
    "char_duplicates_ratio": 0.01,
    "new_line_ratio": 0.3,
}
OFF = {"line_punct_thr": 0.0, "short_line_thr": 1.0, "char_duplicates_ratio": 1.0, "new_line_ratio": 1e9}


def alone():
    """Filters with one rule each, by name."""
    none = dict.fromkeys(QUALITY)
    rules = {
        f"gopher_quality.{k}": GopherQualityFilter(**{**none, k: v}, stop_words=None)
        for k, v in QUALITY.items()
    }
    none = {**dict.fromkeys(REPETITION), "top_n_grams": (), "dup_n_grams": ()}
    for name, value in REPETITION.items():
        rules[f"gopher_repetition.{name}"] = GopherRepetitionFilter(**{**none, name: value})
    for n, most in TOP:
        rules[f"gopher_repetition.top_{n}_gram"] = GopherRepetitionFilter(
            **{**none, "top_n_grams": ((n, most),)}
        )
    for n, most in DUPLICATES:
        rules[f"gopher_repetition.dup_{n}_gram"] = GopherRepetitionFilter(
            **{**none, "dup_n_grams": ((n, most),)}
        )
    for name, value in FINEWEB.items():
        rules[f"fineweb.{name}"] = FineWebQualityFilter(**{**OFF, name: value})
    return rules


def chain():
    """The four filters with their defaults, in FineWeb's order."""
    return {
        "gopher_repetition": GopherRepetitionFilter(),
        "gopher_quality": GopherQualityFilter(),
        "c4": C4QualityFilter(),
        "fineweb": FineWebQualityFilter(),
    }


def verdict(rule, document):
    """ "" where it is kept, else the reason; what it divides by nothing is no verdict."""
    try:
        said = rule.filter(document)
    except ZeroDivisionError:
        return "nothing to divide by"
    return "" if said is True else said[1] if isinstance(said, tuple) else "dropped"


def verdicts(texts, out):
    """What each rule says of each text."""
    rules, filters = alone(), chain()
    found = {"rules": {name: [] for name in rules}, "filters": {name: [] for name in filters}, "left": []}
    for text in texts:
        for name, rule in rules.items():
            found["rules"][name].append(not verdict(rule, Document(text=text, id="0")))
        for name, rule in filters.items():
            document = Document(text=text, id="0")
            found["filters"][name].append(verdict(rule, document))
            if name == "c4":
                found["left"].append(document.text)
    Path(out).write_text(json.dumps(found), encoding="utf-8")


def deduplicate(documents, folder):
    """Exact copies by a hash of the text, then MinHash in four steps, all on disk: what is left."""
    seen, distinct = set(), []
    for document in documents:
        key = hashlib.sha1(document.text.encode()).digest()
        if key not in seen:
            seen.add(key)
            distinct.append(document)
    signing = MinhashDedupSignature(f"{folder}/signatures")
    signing.run(iter(distinct))
    for bucket in range(14):
        MinhashDedupBuckets(f"{folder}/signatures", f"{folder}/buckets").run(None, bucket, 14)
    MinhashDedupCluster(f"{folder}/buckets", f"{folder}/remove").run(None, 0, 1)
    return list(MinhashDedupFilter(f"{folder}/remove").run(iter(distinct)))


def timed(texts, folder):
    """A round for each number on standard input."""
    filters = list(chain().values())
    for line in sys.stdin:
        documents = [Document(text=text, id=str(i)) for i, text in enumerate(texts[: int(line)])]
        began = time.perf_counter()
        kept = [d for d in documents if all(rule.filter(d) is True for rule in filters)]
        ruled = time.perf_counter() - began
        documents = [Document(text=text, id=str(i)) for i, text in enumerate(texts[: int(line)])]
        began = time.perf_counter()
        left = deduplicate(documents, folder)
        deduplicated = time.perf_counter() - began
        shutil.rmtree(folder, ignore_errors=True)
        said = {"rules": ruled, "duplicates": deduplicated, "kept": len(kept), "left": len(left)}
        print(json.dumps(said), flush=True)


def main():
    what, texts, out = sys.argv[1:]
    logger.remove()
    rows = json.loads(Path(texts).read_text(encoding="utf-8"))
    verdicts(rows, out) if what == "verdicts" else timed(rows, out)


if __name__ == "__main__":
    main()
