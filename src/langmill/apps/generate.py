"""`langmill generate`: a model goes on from prompts, one as a stream, many side by side; a masked one fills masks."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from langmill.apps import fill
from langmill.common.errors import DataError, ModelError, UsageError
from langmill.common.metrics import Report
from langmill.common.progress import track
from langmill.common.settings import GenerateSettings, WriteSettings
from langmill.families.folder import Model
from langmill.infer.engine import Engine
from langmill.infer.generate import room
from langmill.infer.ready import ready
from langmill.infer.request import Constraint, Event
from langmill.infer.running import engine_for, runner_for, side_by_side, why_torch, written
from langmill.infer.sampling import Sampling
from langmill.infer.scheduler import Propose
from langmill.model.config import ModelConfig, gap_order
from langmill.text.chat import chat_ids
from langmill.text.infill import gap_ids
from langmill.text.tokenizer import Tokenizer

LOOKUP = 4  # tokens guessed ahead: texts that repeat nothing take 2 % longer, and many side by side 8 %


@dataclass(frozen=True)
class ChatRow:
    """A row of a file that is a chat, and where it stands; the model answers its last turn, a user's."""

    where: str
    messages: list[Any]
    tools: list[Any] | None


Prompt = str | ChatRow


def run(settings: GenerateSettings, *, quiet: bool = False) -> Report:
    """Generate from every prompt of the settings, results in their order.

    A single prompt's text goes to standard output as it is written, unless `quiet`; the speed goes to
    standard error. Results: {"prompt", "text", "tokens", "finish_reason"}, where prompt is a text or a list
    of messages, tokens are the ids that the model wrote, a stop id included, and finish_reason is "stop" or
    "length". A text that ends before its schema, pattern, choice or grammar is met has "incomplete", the reason.
    Those of a masked model are described at `fill.run`.
    """
    if settings.system is not None and not settings.chat:
        raise UsageError("--system is a message of a chat: add --chat")
    if settings.suffix is not None and settings.chat:
        raise UsageError("--suffix is what follows a gap in a text, and a chat has none: leave --chat out")
    check_alone(settings)
    prompts = read_prompts(settings)
    sampling = sampling_of(settings)
    model, tokenizer = ready(
        settings.model, settings.dtype, settings.device, settings.threads, settings.adapter
    )
    if fill.fills(model):
        return fill.run(settings, model, tokenizer, prompts, quiet)
    _check_writes(settings, model)
    if settings.chat and tokenizer.chat_template is None:
        raise ModelError(
            f"{settings.model} has no chat template, so it was not made for chats: leave --chat out to go on "
            "from the prompt itself, or take a model that was tuned on chats"
        )
    ids = [_prompt_ids(tokenizer, prompt, settings, gap_order(model.config)) for prompt in prompts]
    room(model, ids, sampling.max_new_tokens)  # all prompts, before any work
    results: list[dict[str, Any]] = [
        {"prompt": _shown(prompt), "text": "", "tokens": [], "finish_reason": None} for prompt in prompts
    ]
    constraint = constraint_of(settings, tokenizer, model.config.vocab)
    engine = _engine(model, tokenizer, max(map(len, ids)), len(ids), settings)
    began = time.perf_counter()
    streaming = len(prompts) == 1 and not quiet
    try:
        with track("generating", total=len(prompts), unit="prompts", quiet=quiet or streaming) as progress:
            for event in (event for events in written(engine, ids, sampling, constraint) for event in events):
                _take(results[event.request], event)
                if streaming:
                    sys.stdout.write(event.text)
                    sys.stdout.flush()
                if event.finish:
                    progress.advance(1)
    finally:  # Ctrl-C leaves the line whole too
        if streaming:
            print(flush=True)
    guesses = (engine.counts["guessed"], engine.counts["guessed right"])
    report = _report(results, ids, time.perf_counter() - began, streaming, guesses)
    if not quiet:
        print(_summary(report, settings.max_new_tokens), file=sys.stderr)
    return report


def _check_writes(settings: GenerateSettings, model: Model) -> None:
    """ModelError where a model writes no text by itself, UsageError where one that does is asked for alternatives."""
    c = model.config
    if not isinstance(c, ModelConfig) or c.writes:
        if settings.top is not None:
            raise UsageError(
                f"--top is for models that guess what a mask hides, such as BERT: {settings.model} writes on"
            )
        return
    if c.head is not None and c.head.task == "text":
        raise ModelError(
            f"{settings.model} writes about a text that it reads: langmill translate uses such a model"
        )
    task = "embed" if c.head is None else c.head.task
    command = {"multilabel": "classify", "regress": "classify"}.get(task, task)
    raise ModelError(f"{settings.model} writes no text: langmill {command} uses such a model")


def sampling_of(settings: WriteSettings) -> Sampling:
    """The part of the settings that chooses tokens."""
    return Sampling(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p,
        repetition_penalty=settings.repetition_penalty,
        seed=settings.seed,
        stop=tuple(settings.stop),
    )


def check_alone(settings: WriteSettings) -> None:
    """UsageError where settings exclude each other."""
    for names in (("json_schema", "regex", "choice", "grammar"), ("lookup", "draft")):
        asked = [name for name in names if getattr(settings, name, None) not in (None, 0, [])]
        if len(asked) > 1:
            options = " and ".join(f"--{name.replace('_', '-')}" for name in asked)
            raise UsageError(f"{options} exclude each other: give one of them")


def constraint_of(
    settings: GenerateSettings, tokenizer: Tokenizer, vocab: int
) -> Callable[[], Constraint] | None:
    """What makes a constraint for each text, where one is asked for; UsageError for one that nothing can meet."""
    asked = (settings.json_schema, settings.regex, settings.choice or None, settings.grammar)
    if asked == (None, None, None, None):
        return None
    from langmill.infer.constrain import Grammars  # a second of loading, for those who want it

    grammars = Grammars(tokenizer, vocab)
    if settings.json_schema is not None:
        schema = settings.json_schema
        made = partial(
            grammars.json_schema, schema if _is_json(schema) else _contents(Path(schema), "json-schema")
        )
    elif settings.regex is not None:
        made = partial(grammars.regex, settings.regex)
    elif settings.grammar is not None:
        made = partial(grammars.grammar, _contents(settings.grammar, "grammar"))
    else:
        made = partial(grammars.choice, settings.choice)
    made()  # what is wrong with it shows before any work
    return made


def _is_json(text: str) -> bool:
    return text.lstrip().startswith("{") or text.strip() in ("true", "false")


def _contents(path: Path, option: str) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as reason:
        raise DataError(f"{path} is not UTF-8 (byte {reason.start}): convert it first") from None
    except OSError as reason:
        raise UsageError(f"--{option}: {path} cannot be read: {reason.strerror or reason}") from None


def propose_of(
    settings: WriteSettings, model: Model, tokenizer: Tokenizer, slots: int, length: int
) -> Propose | None:
    """What guesses ahead, where it is asked for; ModelError for a draft with other tokens than the model's."""
    if settings.draft is not None:
        from langmill.infer.speculative import Draft

        draft, theirs = ready(settings.draft, settings.dtype, settings.device, settings.threads)
        if theirs.vocab != tokenizer.vocab:
            raise ModelError(
                f"{settings.draft} has other tokens than {settings.model}: a draft is a smaller model with the same "
                "tokenizer"
            )
        return Draft(runner_for(draft, slots, length, release=True), vocab=model.config.vocab)
    most = settings.lookup
    if most is None:
        most = LOOKUP if slots == 1 and why_torch(model) is None else 0
    if not most:
        return None
    if not isinstance(model.config, ModelConfig):
        raise UsageError("a recurrence reads all tokens again after a wrong guess: leave --lookup out")
    from langmill.infer.speculative import PromptLookup

    return PromptLookup(most)


def read_prompts(settings: GenerateSettings) -> list[Prompt]:
    """The prompts given as arguments, then those of the file."""
    prompts: list[Prompt] = [*settings.prompt]
    if settings.file is not None:
        prompts += _from_file(settings.file)
    if not prompts:
        raise UsageError(
            "there is no prompt: give one, or --file FILE with at least one, or text on standard input"
        )
    return prompts


def _from_file(path: Path) -> Sequence[Prompt]:
    """JSONL rows by their suffix, else one prompt a line; lines without text are no prompts."""
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as reason:
        raise DataError(f"{path} is not UTF-8 (byte {reason.start}): convert it first") from None
    except (FileNotFoundError, IsADirectoryError):
        raise UsageError(f"{path} is no file: --file takes one with prompts") from None
    numbered = [(number, line.rstrip("\r")) for number, line in enumerate(lines, 1) if line.strip()]
    if path.suffix != ".jsonl":
        return [line for _, line in numbered]
    return [_from_row(line, f"{path}, line {number}") for number, line in numbered]


def _from_row(line: str, where: str) -> Prompt:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as reason:
        raise DataError(f"{where} is not JSON: {reason}") from None
    if isinstance(row, dict) and "messages" in row:
        return _chat_row(row, where)
    found = [row[key] for key in ("prompt", "text") if key in row] if isinstance(row, dict) else []
    if not found or not isinstance(found[0], str):
        raise DataError(f'{where} has no text in "prompt" or "text", and no "messages"')
    return found[0]


def _chat_row(row: dict[str, Any], where: str) -> ChatRow:
    messages, tools = row["messages"], row.get("tools") or None
    if not isinstance(messages, list) or not (tools is None or isinstance(tools, list)):
        raise DataError(f"{where}: messages and tools are lists")
    last = messages[-1] if messages else None
    role = last.get("role") if isinstance(last, dict) else None
    if role != "user":
        raise DataError(f"{where}: its last turn is {role or 'none'}; the model answers a user's")
    return ChatRow(where, messages, tools)


def _shown(prompt: Prompt) -> str | list[Any]:
    return prompt if isinstance(prompt, str) else prompt.messages


def _prompt_ids(tokenizer: Tokenizer, prompt: Prompt, settings: GenerateSettings, order: str) -> list[int]:
    if isinstance(prompt, ChatRow):
        if settings.system is not None:
            raise UsageError(f"{prompt.where} is a chat as it stands: --system is for prompts that are text")
        if settings.suffix is not None:
            raise UsageError(
                f"{prompt.where} is a chat, which has no gap: --suffix is for prompts that are text"
            )
        try:
            return chat_ids(tokenizer, prompt.messages, add_generation_prompt=True, tools=prompt.tools)
        except DataError as error:
            raise DataError(f"{prompt.where}: {error}") from None
    if settings.suffix is not None:
        return gap_ids(tokenizer, prompt, settings.suffix, order)
    if not settings.chat:
        return tokenizer.prompt_ids(prompt)
    system = [] if settings.system is None else [{"role": "system", "content": settings.system}]
    return chat_ids(tokenizer, [*system, {"role": "user", "content": prompt}], add_generation_prompt=True)


def _engine(
    model: Model, tokenizer: Tokenizer, longest: int, prompts: int, settings: GenerateSettings
) -> Engine:
    """An engine that takes the model for itself, with room for the longest prompt and what is written to it."""
    length = longest + settings.max_new_tokens - 1  # the last token is never read
    slots = side_by_side(model, prompts, length, settings.kv_bits)
    return engine_for(
        model,
        tokenizer,
        slots=slots,
        length=length,
        propose=propose_of(settings, model, tokenizer, slots, length),
        kv_bits=settings.kv_bits,
        release=True,
        queue_tokens=sys.maxsize,  # all prompts are here already: a bound would protect nothing
    )


def _take(result: dict[str, Any], event: Event) -> None:
    result["text"] += event.text
    result["tokens"] += event.ids
    result["finish_reason"] = event.finish
    if event.reason is not None:
        result["incomplete"] = event.reason


def _report(
    results: list[dict[str, Any]], ids: Sequence[Sequence[int]], seconds: float, streamed: bool,
    guesses: tuple[int, int],
) -> Report:  # fmt: skip
    tokens = sum(len(result["tokens"]) for result in results)
    if len(results) == 1:
        text = "" if streamed else results[0]["text"]
    else:
        text = "\n\n".join(f"> {_asked(result['prompt'])}\n{result['text']}" for result in results)
    return Report(
        counts={
            "prompts": len(results),
            "prompt_tokens": sum(map(len, ids)),
            "tokens": tokens,
            "guessed": guesses[0],
            "guessed_right": guesses[1],
        },
        figures={"tokens_per_second": tokens / seconds, "seconds_generating": seconds},
        text=text,
        extra={"results": results},
    )


def _asked(prompt: str | list[Any]) -> Any:
    return prompt if isinstance(prompt, str) else prompt[-1].get("content", "")


def _summary(report: Report, wanted: int) -> str:
    """How much was written, how fast and, of a single text, why it ended."""
    tokens, results = report.counts["tokens"], report.extra["results"]
    words = f"{tokens} tokens, {report.figures['tokens_per_second']:.1f} tokens/s"
    if report.counts["guessed"]:
        words += f", {report.counts['guessed_right']} of {report.counts['guessed']} guesses right"
    cut = [result["incomplete"] for result in results if "incomplete" in result]
    if len(results) > 1:
        return words + (f"; {len(cut)} texts are not complete: {cut[0]}" if cut else "")
    reason = results[0]["finish_reason"]
    full = reason == "length" and tokens < wanted
    words += f", ended by {'the last position of the model' if full else reason}"
    return words + (f"; {cut[0]}" if cut else "")
