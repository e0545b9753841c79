"""`langmill generate`: a model goes on from prompts, one as a stream, many in batches."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from langmill.common.errors import DataError, ModelError, UsageError
from langmill.common.metrics import Report
from langmill.common.progress import track
from langmill.common.settings import GenerateSettings, WriteSettings
from langmill.families.folder import Model
from langmill.infer.generate import Piece, generate_pieces, room
from langmill.infer.ready import ready
from langmill.infer.sampling import Sampling, streams
from langmill.model.config import ModelConfig
from langmill.text.chat import chat_ids
from langmill.text.tokenizer import Tokenizer

_ROWS = 32  # prompts in one batch, at most
_CACHE_BYTES = 1 << 30  # and bytes of keys and values, unless one prompt alone needs more


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
    "length".
    """
    if settings.system is not None and not settings.chat:
        raise UsageError("--system is a message of a chat: add --chat")
    prompts = read_prompts(settings)
    sampling = sampling_of(settings)
    model, tokenizer = ready(
        settings.model, settings.dtype, settings.device, settings.threads, settings.adapter
    )
    if settings.chat and tokenizer.chat_template is None:
        raise ModelError(
            f"{settings.model} has no chat template, so it was not made for chats: leave --chat out to go on "
            "from the prompt itself, or take a model that was tuned on chats"
        )
    ids = [_prompt_ids(tokenizer, prompt, settings) for prompt in prompts]
    room(model, ids, sampling.max_new_tokens)  # all prompts, before any work
    results: list[dict[str, Any]] = [
        {"prompt": _shown(prompt), "text": "", "tokens": [], "finish_reason": None} for prompt in prompts
    ]
    began = time.perf_counter()
    streaming = len(prompts) == 1 and not quiet
    try:
        with track("generating", total=len(prompts), unit="prompts", quiet=quiet or streaming) as progress:
            for piece in _pieces(model, tokenizer, ids, sampling):
                _take(results[piece.row], piece)
                if streaming:
                    sys.stdout.write(piece.text)
                    sys.stdout.flush()
                if piece.finish:
                    progress.advance(1)
    finally:  # Ctrl-C leaves the line whole too
        if streaming:
            print(flush=True)
    report = _report(results, ids, time.perf_counter() - began, streaming)
    if not quiet:
        print(_summary(report, settings.max_new_tokens), file=sys.stderr)
    return report


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


def _prompt_ids(tokenizer: Tokenizer, prompt: Prompt, settings: GenerateSettings) -> list[int]:
    if isinstance(prompt, ChatRow):
        if settings.system is not None:
            raise UsageError(f"{prompt.where} is a chat as it stands: --system is for prompts that are text")
        try:
            return chat_ids(tokenizer, prompt.messages, add_generation_prompt=True, tools=prompt.tools)
        except DataError as error:
            raise DataError(f"{prompt.where}: {error}") from None
    if not settings.chat:
        return tokenizer.prompt_ids(prompt)
    system = [] if settings.system is None else [{"role": "system", "content": settings.system}]
    return chat_ids(tokenizer, [*system, {"role": "user", "content": prompt}], add_generation_prompt=True)


def _pieces(
    model: Model, tokenizer: Tokenizer, ids: Sequence[Sequence[int]], sampling: Sampling
) -> Iterator[Piece]:
    """Pieces of all prompts, `row` counting the prompts as given, in batches of like length."""
    numbers = streams(sampling.seed, ids)
    longest_first = sorted(range(len(ids)), key=lambda index: -len(ids[index]))
    while longest_first:
        rows = _fitting(model, len(ids[longest_first[0]]) + sampling.max_new_tokens)
        batch, longest_first = longest_first[:rows], longest_first[rows:]
        prompts, draws = [ids[index] for index in batch], [numbers[index] for index in batch]
        for step in generate_pieces(model, tokenizer, prompts, sampling, draws):
            yield from (piece._replace(row=batch[piece.row]) for piece in step)


def _fitting(model: Model, tokens: int) -> int:
    """How many rows of so many tokens one batch takes."""
    if not isinstance(model.config, ModelConfig):
        return _ROWS
    c = model.config.main
    row_bytes = 2 * c.layers * c.kv_heads * c.head_dim * model.head_weight.element_size() * tokens
    return max(1, min(_ROWS, _CACHE_BYTES // row_bytes))


def _take(result: dict[str, Any], piece: Piece) -> None:
    result["text"] += piece.text
    result["tokens"].append(piece.id)
    result["finish_reason"] = piece.finish


def _report(
    results: list[dict[str, Any]], ids: Sequence[Sequence[int]], seconds: float, streamed: bool
) -> Report:
    tokens = sum(len(result["tokens"]) for result in results)
    if len(results) == 1:
        text = "" if streamed else results[0]["text"]
    else:
        text = "\n\n".join(f"> {_asked(result['prompt'])}\n{result['text']}" for result in results)
    return Report(
        counts={"prompts": len(results), "prompt_tokens": sum(map(len, ids)), "tokens": tokens},
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
    if len(results) > 1:
        return words
    reason = results[0]["finish_reason"]
    full = reason == "length" and tokens < wanted
    return f"{words}, ended by {'the last position of the model' if full else reason}"
