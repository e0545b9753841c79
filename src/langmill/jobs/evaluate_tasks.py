"""What one model makes of rows: multiple choice, generation, answers found in texts, classification, translation.

Figures
    choices    acc, acc_norm (by characters), as in lm-evaluation-harness
    generate   exact_match, f1, by SQuAD's rule; answer the same, of a model that was taught to point at answers
    classify   accuracy, macro_f1, log_loss, calibration_error; for several labels micro_f1, macro_f1, exact; for
               numbers mean_absolute_error, root_mean_squared_error, pearson, spearman
    translate  bleu, chrf, as sacrebleu's defaults give them
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from langmill.apps import answer as pointing
from langmill.apps import tag as tagging
from langmill.apps.classify import labels_of, limit_taught
from langmill.apps.texts import Row
from langmill.apps.translate import checked, translate
from langmill.apps.zero_shot import chooser
from langmill.common.errors import DataError, MissingExtra, ModelError, UsageError
from langmill.common.settings import ClassifySettings, EvaluateSettings, TranslateSettings
from langmill.data.tasks import LabelRow, QuestionRow, TranslationRow, WordRow
from langmill.evaluate import labels as scores
from langmill.evaluate import overlap
from langmill.evaluate.choices import answered, chosen, question
from langmill.evaluate.compare import Figures
from langmill.families.folder import Model, read_config
from langmill.families.heads import task_of
from langmill.families.hub import resolve
from langmill.infer.choices import longest
from langmill.infer.generate import generate_pieces
from langmill.infer.read import document_scores
from langmill.infer.sampling import Sampling
from langmill.jobs.evaluate_rows import Asked, OnRows, batches, joined
from langmill.model.config import ModelConfig
from langmill.text.answer import exact_match, f1
from langmill.text.chat import chat_ids
from langmill.text.classify import Labels, class_scores
from langmill.text.tag import best_tags, spans_of
from langmill.text.tasks import Limit, encode_texts
from langmill.text.tokenizer import Tokenizer

ANSWER = 32  # tokens of an answer, where the settings name no number
UNKNOWN = "labels the model was not taught"


@dataclass
class Outcome:
    """A model on the rows, in their order. results: one object a row; template: what the model saw of a row; unknown:
    labels of the rows that the model was not taught, and how often they occur; about: how the model was read."""

    figures: Figures
    results: list[dict[str, Any]]
    template: str = ""
    counted: Counter[str] = field(default_factory=Counter)
    unknown: Counter[str] = field(default_factory=Counter)
    about: dict[str, str] = field(default_factory=dict)


def choose(
    settings: EvaluateSettings,
    model: Model,
    tokenizer: Tokenizer,
    rows: Sequence[Asked],
    before: str,
    on: OnRows,
) -> Outcome:
    """Multiple choice, by likelihood; `before` are the examples."""
    most, counted = longest(model), Counter[str]()
    asked = []
    for row in rows:
        texts = [joined(row.prompt, choice, settings.target_delimiter) for choice in row.answers]
        whole, _ = question(tokenizer, before + row.prompt, texts, None)
        asked.append(question(tokenizer, before + row.prompt, texts, most))
        counted["prompts cut at their beginning"] += len(asked[-1][0]) < len(whole)
    results = []
    for row, own in zip(rows, answered(model, asked, settings.micro_batch_size, on), strict=True):
        logs = [one.log for one in own]
        plain, normed = chosen(logs, row.answers)
        results.append(
            {
                "where": row.where,
                "prompt": row.prompt,
                "choices": list(row.answers),
                "answer": row.right,
                "logs": logs,
                "acc": float(plain == row.right),
                "acc_norm": float(normed == row.right),
            }
        )
    return Outcome(_means(results, ("acc", "acc_norm")), results, counted=counted)


def write(
    settings: EvaluateSettings,
    model: Model,
    tokenizer: Tokenizer,
    rows: Sequence[Asked],
    before: str,
    on: OnRows,
) -> Outcome:
    """Generation, the likeliest token each time, scored against the answers."""
    if isinstance(model.config, ModelConfig) and not model.config.writes:
        raise ModelError(
            f"{settings.model} writes no text by itself, so it cannot answer these rows: take a decoder, or an encoder "
            "that was taught to answer"
        )
    counted, new = Counter[str](), settings.max_new_tokens or ANSWER
    stop = settings.stop or ([] if settings.chat else ["\n"])
    how, most = Sampling(max_new_tokens=new, stop=tuple(stop)), longest(model)
    prompts = [_prompt(tokenizer, before + row.prompt, settings.chat) for row in rows]
    for i, ids in enumerate(prompts):
        if most is not None and len(ids) > most + 1 - new:
            prompts[i] = ids[-max(1, most + 1 - new) :]
            counted["prompts cut at their beginning"] += 1
    order = sorted(range(len(rows)), key=lambda i: -len(prompts[i]))
    texts = [""] * len(rows)
    for part in batches(len(order), settings.micro_batch_size):
        group = order[part]
        for step in generate_pieces(model, tokenizer, [prompts[i] for i in group], how):
            for piece in step:
                texts[group[piece.row]] += piece.text
                counted["answers cut off"] += piece.finish == "length"
        on(len(group))
    results = [
        {
            "where": row.where,
            "prompt": row.prompt,
            "answers": list(row.answers),
            "said": text.strip(),
            "exact_match": exact_match(text.strip(), row.answers),
            "f1": f1(text.strip(), row.answers),
        }
        for row, text in zip(rows, texts, strict=True)
    ]
    return Outcome(_means(results, ("exact_match", "f1")), results, counted=counted)


def _prompt(tokenizer: Tokenizer, text: str, chat: bool) -> list[int]:
    return chat_ids(tokenizer, [{"role": "user", "content": text}]) if chat else tokenizer.prompt_ids(text)


def taught(model: Model) -> bool:
    """Whether a model has a head that classifies."""
    head = model.config.head if isinstance(model.config, ModelConfig) else None
    return head is not None and head.task in ("classify", "multilabel", "regress")


def taught_at(where: str) -> str:
    """The task that the model's folder says its head is for; "text" where it says none."""
    path = resolve(where)
    if path.suffix == ".gguf" or not (path / "config.json").is_file():
        return "text"
    return task_of(read_config(path / "config.json"), "text")


def _limit(model: Model) -> Limit:
    """Long texts are cut as the model was taught, so that a score agrees with finetune's. One that was taught to refuse
    them, of which finetune scores none, reads them in windows here, which are counted."""
    limit = limit_taught(model)
    return replace(limit, policy="window") if limit.policy == "error" else limit


def point(
    settings: EvaluateSettings, model: Model, tokenizer: Tokenizer, rows: Sequence[QuestionRow], on: OnRows
) -> Outcome:
    """Where the model finds the answer in a context; "no answer" may win where some of the rows have none."""
    pointing.check(model, settings.model)
    counted, limit = Counter[str](), _limit(model)
    empty, results = any(not row.answers for row in rows), list[dict[str, Any]]()
    for part in batches(len(rows), settings.micro_batch_size):
        asked = [(row.where, row.question, row.context) for row in rows[part]]
        said = pointing.found(model, tokenizer, asked, limit, counted, no_answer=empty)
        for row, one in zip(rows[part], said, strict=True):
            right = row.answers or ("",)
            results.append(
                {
                    "where": row.where,
                    "question": row.question,
                    "answers": list(row.answers),
                    "said": one["answer"],
                    "score": one["score"],
                    "exact_match": exact_match(one["answer"], right),
                    "f1": f1(one["answer"], right),
                }
            )
        on(len(asked))
    return Outcome(_means(results, ("exact_match", "f1")), results, counted=counted)


def classify(
    settings: EvaluateSettings, model: Model, tokenizer: Tokenizer, rows: Sequence[LabelRow], on: OnRows
) -> Outcome:
    """By the model's own head, or zero-shot among the labels of the rows. A label that the model was not taught counts
    as one that it never says."""
    counted = Counter[str]()
    if not taught(model):
        return _zero_shot(settings, model, tokenizer, rows, counted, on)
    if settings.template is not None or settings.shots:
        raise UsageError(f"{settings.model} was taught its labels: --template and --shots are for zero-shot")
    known = labels_of(model, settings.model)
    limit = _limit(model)
    parts = []
    for part in batches(len(rows), settings.micro_batch_size):
        documents = encode_texts(tokenizer, [row.text for row in rows[part]], limit, counted)
        numbers = [document.number for document in documents]
        parts.append(class_scores(list(document_scores(model, documents)), numbers, known.task)[1])
        on(len(rows[part]))
    shares = np.concatenate(parts)
    if known.task == "regress":
        truth = np.array([float(str(row.label)) for row in rows])
        results = [
            {"where": row.where, "label": float(truth[i]), "said": float(shares[i, 0])}
            for i, row in enumerate(rows)
        ]
        return Outcome(lambda k: scores.numbers(truth[k], shares[k, 0]), results, counted=counted)
    return _labelled(settings, rows, known, shares, counted)


def _zero_shot(
    settings: EvaluateSettings, model: Model, tokenizer: Tokenizer, rows: Sequence[LabelRow], counted: Counter[str],
    on: OnRows,
) -> Outcome:  # fmt: skip
    known = Labels.of(row.label for row in rows)
    if known.task != "classify":
        raise UsageError(
            "zero-shot chooses one label a text, and these rows have lists of them: teach a model first"
        )
    given: dict[str, Any] = {} if settings.template is None else {"template": settings.template}
    if settings.shots:
        if settings.examples is None:
            raise UsageError(
                "--shots needs --examples FILE: rows with text and label, other ones than those of --on"
            )
        given |= {"examples": settings.examples, "shots": settings.shots}
    asked = ClassifySettings(
        model=settings.model,
        labels=list(known.names),
        calibrate=settings.calibrate,
        seed=settings.seed,
        **given,
    )
    choose_labels = chooser(asked, model, tokenizer)
    writes = not isinstance(model.config, ModelConfig) or model.config.writes
    shares = np.zeros((len(rows), len(known.names)))
    for part in batches(len(rows), settings.micro_batch_size):
        batch = [Row(row.where, _one(row), {}) for row in rows[part]]
        for i, result in zip(range(part.start, part.stop), choose_labels(batch, counted), strict=False):
            shares[i] = [result["scores"][name] for name in known.names]
        on(len(batch))
    outcome = _labelled(settings, rows, known, shares, counted)
    outcome.template = asked.template if writes else "label {label}"
    return outcome


def _one(row: LabelRow) -> str:
    return row.text if isinstance(row.text, str) else "\n".join(row.text)


def _some_known(unknown: Counter[str], total: int, known: Sequence[str], where: str) -> None:
    """DataError where a model knows none of the rows' labels: a score would say nothing about it."""
    if total and unknown.total() == total:
        theirs, ours = (", ".join(map(repr, sorted(names)[:10])) for names in (unknown, known))
        raise DataError(f"{where} was taught none of the rows' labels: they are {theirs}, and it says {ours}")


def _labelled(
    settings: EvaluateSettings, rows: Sequence[LabelRow], known: Labels, shares: Any, counted: Counter[str]
) -> Outcome:
    """Shares (K, C of the known labels) against the rows' labels, of which some may not be known."""
    named = [row.label if isinstance(row.label, tuple) else (str(row.label),) for row in rows]
    unknown = Counter(name for own in named for name in own if name not in known.index)
    strange = sorted(unknown)
    _some_known(unknown, sum(map(len, named)), known.names, settings.model)
    counted[UNKNOWN] += len(strange)
    names = Labels((*known.names, *strange), known.task)
    wide = np.hstack((shares, np.zeros((len(rows), len(strange)))))
    results: list[dict[str, Any]] = []
    if known.task == "multilabel":
        truth = np.array([names.target(tuple(own)) for own in named])
        for i, row in enumerate(rows):
            said = [name for name, share in zip(names.names, wide[i], strict=True) if share >= 0.5]
            results.append(
                {"where": row.where, "label": list(named[i]), "said": said, "scores": wide[i].tolist()}
            )
        return Outcome(lambda k: scores.several(truth[k], wide[k]), results, "", counted, unknown)
    if many := [row.where for row, own in zip(rows, named, strict=True) if len(own) != 1]:
        raise UsageError(f"{many[0]} has several labels or none, and the model says one for each text")
    truth = np.array([names.number(own[0]) for own in named])
    for i, row in enumerate(rows):
        best = names.names[int(wide[i].argmax())]
        results.append(
            {"where": row.where, "label": named[i][0], "said": best, "score": float(wide[i].max())}
        )
    return Outcome(lambda k: scores.classified(truth[k], wide[k]), results, "", counted, unknown)


def mark(
    settings: EvaluateSettings, model: Model, tokenizer: Tokenizer, rows: Sequence[WordRow], on: OnRows
) -> Outcome:
    """The spans that a model's tags spell, against those of the rows'. Spans of a label that the model was not taught
    are ones that it never finds."""
    known, limit, counted = tagging.labels_of(model, settings.model), _limit(model), Counter[str]()
    truth, said = [spans_of(row.tags) for row in rows], list[list[tuple[int, int, str]]]()
    for part in batches(len(rows), settings.micro_batch_size):
        texts, names = [row.words for row in rows[part]], [row.where for row in rows[part]]
        for scores_NC in tagging.scored(model, tokenizer, texts, limit, counted, names):
            said.append(spans_of(best_tags(scores_NC, known)))
        on(len(texts))
    taught = {label for name in known.names for _, _, label in spans_of([name])}
    unknown = Counter(label for own in truth for _, _, label in own if label not in taught)
    _some_known(unknown, sum(map(len, truth)), tuple(taught), settings.model)
    counted[UNKNOWN] += len(unknown)
    for row in rows:
        counted["tags repaired"] += row.repaired
        counted["spans widened to whole words"] += row.widened
    results = [
        {
            "where": row.where,
            "text": row.words.text,
            "spans": _placed(row, ours),
            "said": _placed(row, theirs),
        }
        for row, ours, theirs in zip(rows, truth, said, strict=True)
    ]
    labels, counts_KLX = scores.span_counts(truth, said)
    return Outcome(lambda k: scores.span_scores(labels, counts_KLX[k]), results, "", counted, unknown)


def _placed(row: WordRow, spans: Sequence[tuple[int, int, str]]) -> list[dict[str, Any]]:
    places = row.words.spans
    return [{"start": places[a][0], "end": places[b - 1][1], "label": label} for a, b, label in spans]


def render(
    settings: EvaluateSettings, model: Model, tokenizer: Tokenizer, rows: Sequence[TranslationRow], on: OnRows
) -> Outcome:
    """Translation by beam search, against one reference each. MissingExtra without sacrebleu."""
    network, counted = checked(model, settings.model), Counter[str]()
    given: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens} if settings.max_new_tokens else {}
    if "beams" in settings.model_fields_set:  # else as the model's generation_config.json says
        given["beams"] = settings.beams
    asked = TranslateSettings(model=settings.model, **given)
    results: list[dict[str, Any]] = []
    for part in batches(len(rows), settings.micro_batch_size):
        batch = [Row(row.where, row.source, {}) for row in rows[part]]
        for row, found in zip(rows[part], translate(network, tokenizer, batch, asked, counted), strict=True):
            more = {"said": found["translation"], "score": found["score"]}
            results.append({"where": row.where, "source": row.source, "target": row.target, **more})
        on(len(batch))
    try:
        counts = overlap.counts([one["said"] for one in results], [one["target"] for one in results])
    except ImportError:
        raise MissingExtra("eval", "sacrebleu") from None
    return Outcome(lambda k: overlap.scores(counts[k]), results, counted=counted)


def _means(results: Sequence[dict[str, Any]], names: Sequence[str]) -> Figures:
    values = np.array([[float(one[name]) for name in names] for one in results])
    return lambda k: dict(zip(names, values[k].mean(0).tolist(), strict=True))
