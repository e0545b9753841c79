"""`langmill translate`: beam search over the sentences of each text, with its line breaks kept."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

from langmill.apps.texts import Read, Result, Row, each
from langmill.common.errors import DataError, ModelError, UsageError
from langmill.common.metrics import Report
from langmill.common.settings import TranslateSettings
from langmill.families.folder import Model
from langmill.families.generation import rules_of
from langmill.infer.beam import Hypothesis, beam_search
from langmill.infer.ready import ready
from langmill.model.transformer import Transformer
from langmill.text.tasks import READS, Limit
from langmill.text.tokenizer import Tokenizer
from langmill.text.translate import encode_source, join_document, split_document

SOURCE = ("text", "source")
NOT_FOLLOWED = "not followed in generation_config.json"
ROWS = 16  # sentences that are searched together: of like length, so that none waits long for the others


def run(settings: TranslateSettings, *, quiet: bool = False, as_json: bool = False) -> Report:
    """Results: {"text", "translation", "score"}; with --n-best above 1 also "best", for texts of one sentence.

    The score is the mean of the sentences' (beam search's: log-probability a token). A sentence that reached
    --max-new-tokens is counted as "sentences cut off". UsageError for --long-texts: a long text is always read piece
    by piece.
    """
    model, tokenizer = ready(settings.model, settings.dtype, settings.device, settings.threads)
    read = reader(settings, model, tokenizer)
    plain = (lambda result: str(result["translation"])) if settings.plain else None
    return each(settings, read, quiet=quiet, as_json=as_json, plain=plain, blank=True, fields=SOURCE)


def reader(settings: TranslateSettings, model: Model, tokenizer: Tokenizer) -> Read:
    """What translates a batch."""
    if settings.long_texts != "window":
        raise UsageError(
            f"--long-texts {settings.long_texts}: a translator reads a long text piece by piece, so that nothing is "
            "left out; leave the option out"
        )
    network = checked(model, settings.model)

    def read(batch: Sequence[Row], counted: Counter[str]) -> Iterator[Result]:
        yield from translate(network, tokenizer, batch, settings, counted)

    return read


def checked(model: Model, where: str) -> Transformer:
    """ModelError where a model does not read before it writes."""
    if not isinstance(model, Transformer) or len(model.config.stacks) < 2 or model.config.rereads:
        raise ModelError(f"{where} cannot translate: an encoder-decoder such as Marian, BART or T5 is needed")
    return model


def translate(
    model: Transformer,
    tokenizer: Tokenizer,
    batch: Sequence[Row],
    settings: TranslateSettings,
    counted: Counter[str],
) -> Iterator[Result]:
    """The translation of each row, its sentences among those of all rows, sorted by length."""
    assert model.config.encoder_input is not None
    length = min(model.config.encoder_input.length, READS)
    documents = [split_document(tokenizer, row.text, length, sentences=True) for row in batch]
    wanted = [(d, p) for d, pieces in enumerate(documents) for p, piece in enumerate(pieces) if piece.text]
    limit = Limit(length)
    sources = []
    for d, p in wanted:
        try:
            sources.append(encode_source(tokenizer, documents[d][p].text, limit, counted).ids)
        except DataError as error:
            raise DataError(f"{batch[d].where}: {error}") from None
    found = search(model, tokenizer, sources, settings, counted)
    best: list[list[list[Hypothesis]]] = [[[] for _ in pieces] for pieces in documents]
    for (d, p), answers in zip(wanted, found, strict=True):
        best[d][p] = answers
    for row, pieces, mine in zip(batch, documents, best, strict=True):
        texts = [tokenizer.decode(own[0].ids).strip() if own else "" for own in mine]
        scores = [own[0].score for own in mine if own]
        made: Result = {
            "translation": join_document(pieces, texts),
            "score": math.fsum(scores) / len(scores) if scores else 0.0,
        }
        result = {"text": row.text, **row.beside(made)}
        if settings.n_best > 1 and len(scores) == 1:
            (own,) = [own for own in mine if own]
            result["best"] = [{"translation": tokenizer.decode(h.ids).strip(), "score": h.score} for h in own]
        yield result


def search(
    model: Transformer, tokenizer: Tokenizer, sources: Sequence[Sequence[int]], settings: TranslateSettings,
    counted: Counter[str],
) -> list[list[Hypothesis]]:  # fmt: skip
    """The best translations of each source, in order, by the rules that the model came with (generation_config.json).

    What the settings leave open (beams, length_penalty, max_new_tokens) is as those rules say. Rules that are not
    followed are counted.
    """
    rules, given = rules_of(model), settings.model_fields_set
    if rules.unfollowed:
        counted[f"{NOT_FOLLOWED}: {', '.join(rules.unfollowed)}"] = len(rules.unfollowed)
    beams = settings.beams
    if "beams" not in given and rules.beams is not None:
        beams = max(rules.beams, min(settings.n_best, beams))
    most = settings.max_new_tokens if "max_new_tokens" in given else rules.most or settings.max_new_tokens
    penalty = settings.length_penalty
    if "length_penalty" not in given and rules.penalty is not None:
        penalty = rules.penalty
    order = sorted(range(len(sources)), key=lambda i: -len(sources[i]))
    found: list[list[Hypothesis]] = [[] for _ in sources]
    for at in range(0, len(order), ROWS):
        group = order[at : at + ROWS]
        answers = beam_search(
            model,
            [sources[i] for i in group],
            stops=tokenizer.stop_ids,
            beams=beams,
            n_best=min(settings.n_best, beams),
            length_penalty=penalty,
            max_new_tokens=most,
            early_stopping=rules.early,
            rules=rules,
        )
        for i, own in zip(group, answers, strict=True):
            found[i] = own
            counted["sentences cut off"] += not own[0].ended
    return found
