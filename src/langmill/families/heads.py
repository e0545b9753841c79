"""What a foreign model is for, and the names of its labels: from `architectures`, `id2label` and `problem_type`."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal, get_args

from langmill.common.errors import ModelError, UsageError
from langmill.families.weights import number
from langmill.model.config import Activation, Gaps, Head, Task
from langmill.text.tasks import Limit

MOST_LABELS = 1 << 20
SUFFIXES: dict[str, Task] = {  # the first that fits
    "ForCausalLM": "text",
    "LMHeadModel": "text",
    "ForMaskedLM": "text",
    "ForPreTraining": "text",
    "ForConditionalGeneration": "text",
    "MTModel": "text",
    "ForSequenceClassification": "classify",
    "ForTokenClassification": "tag",
    "ForQuestionAnswering": "answer",
    "BartModel": "text",  # a body with a decoder that reads what an encoder made can only write
    "MarianModel": "text",
    "T5Model": "text",
    "Model": "embed",
}
ENDINGS: dict[
    Task, str
] = {  # of the architecture that is written for each task; that for text is a family's own
    "classify": "ForSequenceClassification",
    "multilabel": "ForSequenceClassification",
    "regress": "ForSequenceClassification",
    "tag": "ForTokenClassification",
    "answer": "ForQuestionAnswering",
    "embed": "Model",
}
PROBLEMS: dict[str | None, Task] = {
    "single_label_classification": "classify",
    "multi_label_classification": "multilabel",
    "regression": "regress",
}


def task_of(theirs: Mapping[str, Any], default: Task) -> Task:
    """What the first of `architectures` is for; `default` where there is none."""
    named = theirs.get("architectures")
    if not named:
        return default
    if not isinstance(named, list) or not isinstance(named[0], str):
        raise ModelError(f"config.json: architectures is {named!r}, not a list of names")
    task = next((task for suffix, task in SUFFIXES.items() if named[0].endswith(suffix)), None)
    if task is None:
        raise ModelError(
            f"config.json: the architecture {named[0]} is not supported; known endings are {', '.join(SUFFIXES)}"
        )
    if task == "answer" and (outputs := len(labels_of(theirs))) != 2:
        raise ModelError(
            f"config.json: {named[0]} is announced with {outputs} scores a token (num_labels, id2label); a model that "
            "points at answers has two, for where they begin and where they end"
        )
    return problem_of(theirs) if task == "classify" else task


def problem_of(theirs: Mapping[str, Any]) -> Task:
    """Whether classification is by one label, by several, or a number, as transformers finds it."""
    problem = theirs.get("problem_type")
    if problem is not None and problem not in PROBLEMS:
        known = ", ".join(str(name) for name in PROBLEMS)
        raise ModelError(f"config.json: problem_type is {problem!r}; supported are {known}")
    labels = len(labels_of(theirs))
    if problem is None:
        return "regress" if labels == 1 else "classify"
    if problem == "regression" and labels != 1:
        raise ModelError(
            f"config.json: problem_type is 'regression' with {labels} numbers a text; supported is one (num_labels 1)"
        )
    return PROBLEMS[problem]


def labels_of(theirs: Mapping[str, Any]) -> tuple[str, ...]:
    """The labels by their numbers; transformers' LABEL_0, LABEL_1, … where they have no names."""
    named = theirs.get("id2label")
    if named is None:
        return tuple(f"LABEL_{i}" for i in range(number(theirs, "num_labels", 2, MOST_LABELS)))
    if not isinstance(named, Mapping) or not named or len(named) > MOST_LABELS:
        raise ModelError(f"config.json: id2label is {str(named)[:80]!r}, not a table of labels")
    by_number = {str(key): value for key, value in named.items()}
    if set(by_number) != {str(i) for i in range(len(named))}:
        raise ModelError(f"config.json: id2label must number its labels from 0 to {len(named) - 1}")
    labels = tuple(str(by_number[str(i)]) for i in range(len(named)))
    if len(set(labels)) < len(labels):
        [(twice, _)] = Counter(labels).most_common(1)
        raise ModelError(
            f"config.json: id2label gives the name {twice!r} to two numbers, whose scores could not be told apart: "
            "give each a name of its own"
        )
    return labels


def reader_head(
    task: Task, vocab: int, activation: Activation, labels: tuple[str, ...], dense: Literal["tanh", "relu"],
    pooler: Head | None,
) -> Head | None:  # fmt: skip
    """What stands on an encoder of BERT's kind for each task. dense: what follows the dense layer before the scores of
    a whole text. pooler: what stands there where nothing is scored."""
    match task:
        case "text":
            return Head(vocab, True, True, activation, transform_norm=True)
        case "embed":
            return pooler
        case "tag":
            return Head(len(labels), False, True, task="tag", labels=labels)
        case "answer":
            return Head(2, False, True, task="answer")
    return Head(len(labels), False, True, dense, pool="first", task=task, labels=labels)


def threshold_of(theirs: Mapping[str, Any]) -> float | None:
    """How much likelier "no answer" must be to be said, of a model that was taught to point at answers here; None (null
    in the file): it never is."""
    given = theirs.get("answer_threshold", 0.0)
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, int | float) or not math.isfinite(given):
        raise ModelError(f"config.json: answer_threshold is {given!r}, not a number")
    return float(given)


def limit_of(theirs: Mapping[str, Any]) -> Limit | None:
    """How texts were cut when a model was taught here; None of one that does not say."""
    given = theirs.get("long_texts")
    if given is None:
        return None
    numbers = [given.get(name) for name in ("length", "overlap")] if isinstance(given, Mapping) else []
    if numbers and all(type(value) is int for value in numbers):
        with contextlib.suppress(UsageError):
            return Limit(given["length"], given.get("policy", ""), given["overlap"])
    raise ModelError(f"config.json: long_texts is {str(given)[:80]!r}, not a length, a policy and an overlap")


def gaps_of(theirs: Mapping[str, Any]) -> Gaps:
    """How a model that was pretrained here is asked to fill a gap."""
    given = theirs.get("gap_order", "psm")
    if given not in get_args(Gaps):
        raise ModelError(f"config.json: gap_order is {given!r}, not one of {', '.join(get_args(Gaps))}")
    order: Gaps = given
    return order


def described(head: Head) -> dict[str, Any]:
    """The entries of a `config.json` that `task_of`, `labels_of` and `limit_of` read back, and a threshold of None."""
    problem = {task: name for name, task in PROBLEMS.items()}.get(head.task)
    own: dict[str, Any] = {} if head.limit is None else {"long_texts": asdict(head.limit)}
    if head.task == "answer" and head.threshold is None:
        own["answer_threshold"] = None
    if head.task not in ("classify", "multilabel", "regress", "tag"):
        return own
    names = head.labels or tuple(f"LABEL_{i}" for i in range(head.outputs))
    back: dict[str, Any] = own | {"id2label": {str(i): name for i, name in enumerate(names)}}
    back["label2id"] = {name: i for i, name in enumerate(names)}
    return back if problem is None else back | {"problem_type": problem}
