"""presidio's pattern recognisers: run by the peer's Python, with presidio-analyzer installed.

python presidio_patterns.py finds TEXTS OUT
python presidio_patterns.py time TEXTS

TEXTS is a JSON list. `finds` writes for each text what was found: start, end, type, score. `time` reads numbers from
standard input: for each it analyses so many of the texts and prints a JSON object with the seconds. The engine is a
blank one, so no model is looked for, and the list of public suffixes is the one that comes with tldextract.
"""

import json
import logging
import sys
import time
from pathlib import Path

import spacy
import tldextract
import tldextract.tldextract
from presidio_analyzer import AnalyzerEngine, RecognizerRegistry
from presidio_analyzer.nlp_engine import SpacyNlpEngine


class Blank(SpacyNlpEngine):
    """Words, and nothing known of them."""

    def __init__(self):
        super().__init__()
        self.nlp = {"en": spacy.blank("en")}

    def load(self):
        pass


def engine():
    """With all recognisers that presidio has for English."""
    logging.disable(logging.CRITICAL)
    tldextract.tldextract.TLD_EXTRACTOR = tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None)
    registry = RecognizerRegistry()
    registry.load_predefined_recognizers(languages=["en"])
    return AnalyzerEngine(registry=registry, nlp_engine=Blank(), supported_languages=["en"])


def main():
    work, file = sys.argv[1:3]
    texts = json.loads(Path(file).read_text(encoding="utf-8"))
    analyzer = engine()
    if work == "finds":
        found = [
            [
                [one.start, one.end, one.entity_type, one.score]
                for one in analyzer.analyze(text, language="en")
            ]
            for text in texts
        ]
        Path(sys.argv[3]).write_text(json.dumps(found), encoding="utf-8")
        return
    for line in sys.stdin:
        began = time.perf_counter()
        for text in texts[: int(line)]:
            analyzer.analyze(text, language="en")
        print(json.dumps({"seconds": time.perf_counter() - began}), flush=True)


if __name__ == "__main__":
    main()
