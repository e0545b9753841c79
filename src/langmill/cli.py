"""The command line: parse, call one function, print.

Every command is one row of COMMANDS. Its options are the fields of its settings class, so --help, YAML
files and overrides speak of the same names. Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

from langmill import __version__
from langmill.common.errors import LangmillError, UsageError

if TYPE_CHECKING:
    from langmill.common.configure import Key
    from langmill.common.metrics import Report
    from langmill.common.settings import Settings


@dataclass(frozen=True)
class Command:
    """`langmill NAME POSITIONAL...` makes `settings` and calls `function` of `module` with them.

    `preview`, "module:function", answers --dry-run; without one the settings are shown.
    """

    name: str
    module: str
    help: str
    settings: str | None = None
    positional: tuple[str, ...] = ()
    function: str = "run"
    preview: str | None = None


COMMANDS = (
    Command("quickstart", "jobs.quickstart", "Text to model to report, in minutes.", "QuickstartSettings"),
    Command("plan", "jobs.plan", "What a run would cost here, before it runs.", "PlanSettings", ("path",)),
    Command("doctor", "jobs.doctor", "What this machine can do, and which extras are installed."),
    Command(
        "data prepare", "jobs.prepare", "Raw files to clean documents, each one accounted for.", "PrepareSettings",
        ("source",),
    ),
    Command(
        "data report", "jobs.prepare", "A prepared folder as a page and a datasheet.", "PreparedSettings", ("folder",),
        "report",
    ),
    Command("data why", "jobs.prepare", "What became of a document.", "WhySettings", ("folder", "id"), "why"),
    Command(
        "data forget", "jobs.forget", "Remove documents for good.", "ForgetSettings", ("folder",),
        preview="jobs.forget:preview",
    ),
    Command("data shards", "jobs.shards", "Text to token shards.", "ShardsSettings", ("path",)),
    Command("tokenizer train", "jobs.tokenizer", "Text to a vocabulary.", "TokenizerTrainSettings", ("path",), "train"),
    Command(
        "tokenizer inspect", "jobs.tokenizer", "What a tokenizer holds, and what it makes of a text.",
        "TokenizerInspectSettings", ("tokenizer", "text"), "inspect",
    ),
    Command(
        "pretrain", "jobs.pretrain", "Text or shards to a model folder.", "PretrainSettings", ("path",),
        preview="jobs.preview:run",
    ),
    Command(
        "finetune", "jobs.finetune", "Teach a model: by chats, labels, answers, pairs, rewards.",
        "FinetuneSettings", ("model",), preview="jobs.finetune:preview",
    ),
    Command(
        "compress", "jobs.compress", "A model in 8 or 4 bits.", "CompressSettings", ("model",),
        preview="jobs.compress:preview",
    ),
    Command("merge", "jobs.merge", "An adapter and its model to one model.", "MergeSettings", ("adapter",)),
    Command("export", "jobs.export", "A model for other tools: GGUF or plain weights.", "ExportSettings", ("model",)),
    Command("generate", "apps.generate", "A model writes on from a prompt.", "GenerateSettings", ("model", "prompt")),
    Command("chat", "apps.chat", "Talk with a model in the terminal.", "ChatSettings", ("model",)),
    Command("classify", "apps.classify", "Label texts, as taught or zero-shot.", "ClassifySettings", ("model", "text")),
    Command("tag", "apps.tag", "Find names and other spans in texts.", "TagSettings", ("model", "text")),
    Command("answer", "apps.answer", "Answer questions from texts.", "AnswerSettings", ("model", "text")),
    Command("translate", "apps.translate", "Translate texts.", "TranslateSettings", ("model", "text")),
    Command("embed", "apps.embed", "A vector for each text.", "EmbedSettings", ("model", "text")),
    Command(
        "similar", "apps.embed", "The texts that are nearest to a query.", "SimilarSettings",
        ("model", "query", "text"), "similar",
    ),
    Command(
        "serve", "serve.run", "Models behind HTTP: OpenAI's routes and a chat page.", "ServeSettings", ("model",)
    ),
    Command("evaluate", "jobs.evaluate", "Score a model on text or rows.", "EvaluateSettings", ("model",)),
    Command(
        "privacy redact", "jobs.redact", "Files without personal details and secrets.", "RedactSettings", ("file",)
    ),
)  # fmt: skip
GROUPS = {
    "data": "Text to documents to token shards.",
    "tokenizer": "Train and inspect tokenizers.",
    "privacy": "Keep people out of data.",
}
READERS = tuple(f"apps.{name}" for name in ("classify", "tag", "answer", "translate", "embed"))  # of texts
COMMON = ("config", "seed", "json", "debug", "quiet", "dry_run", "help")


@dataclass(frozen=True)
class Call:
    """A parsed command line: the command, the words after it, and what stood behind "--"."""

    row: Command
    words: list[str]
    verbatim: list[str]
    config: Path | None
    seed: int | None
    quiet: bool
    dry_run: bool


def main() -> NoReturn:
    """The console script: run the command line of this process and leave with its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(encoding="utf-8", errors="backslashreplace")
    if reconfigure := getattr(sys.stdin, "reconfigure", None):
        reconfigure(encoding="utf-8-sig", errors="strict")  # whatever the locale says
    os.environ.setdefault("DO_NOT_TRACK", "1")  # for the libraries that would phone home
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and print its result or its error; the exit code is returned."""
    options = arguments[: list(arguments).index("--")] if "--" in arguments else arguments
    debug, as_json = "--debug" in options, "--json" in options
    if not debug:
        warnings.simplefilter("ignore")
    name = " ".join(arguments[:1])
    try:
        call = _parse(arguments)
        if isinstance(call, int):
            return call
        name = call.row.name
        report, seconds = _execute(call, as_json)
        print_result(name, report, seconds, as_json=as_json)
        return 0 if report.ok else 1
    except BaseException as error:
        if isinstance(error, (SystemExit, BrokenPipeError)):
            return 141 if isinstance(error, BrokenPipeError) else int(error.code or 0)
        if debug:
            traceback.print_exc()
        code, kind, message = _explain(error)
        print(f"langmill: {message}", file=sys.stderr)
        if as_json:
            failure = {"type": kind, "message": message}
            print(json.dumps({"command": name, "ok": False, "error": failure}, ensure_ascii=False))
        return code


def _parse(arguments: Sequence[str]) -> Call | int:
    """What typer makes of the arguments; an exit code where it has printed help or the version."""
    if not arguments or (len(arguments) == 1 and arguments[0] in GROUPS):
        arguments = [*arguments, "--help"]
    try:
        found = typer.main.get_command(build())(list(arguments), prog_name="langmill", standalone_mode=False)
    except Exception as error:  # typer's own errors know the command line they are about
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        raise UsageError(f"{message()} (see --help)") from None
    return found if isinstance(found, Call) else int(found or 0)


def _execute(call: Call, as_json: bool) -> tuple[Report, float]:
    settings = read_settings(call)
    module, name = call.row.module, call.row.function
    if call.dry_run:
        if call.row.preview is None:
            return _shown(settings), 0.0
        module, name = call.row.preview.split(":")
    function = getattr(importlib.import_module(f"langmill.{module}"), name)
    quiet = call.quiet or (as_json and call.row.name == "generate")  # nothing streams before the JSON object
    more: dict[str, Any] = {"as_json": as_json} if call.row.module in READERS else {}
    if call.row.name == "serve":
        more["state_home"] = os.environ.get("XDG_STATE_HOME", "")
    start = time.monotonic()
    report = function(settings, quiet=quiet, **more) if settings else function(quiet=quiet)
    return report, time.monotonic() - start


def _shown(settings: Settings | None) -> Report:
    from langmill.common.configure import as_yaml
    from langmill.common.metrics import Report

    if settings is None:
        return Report()
    return Report(text=as_yaml(settings), extra={"settings": settings.model_dump(mode="json", by_alias=True)})


def print_result(name: str, report: Report, seconds: float, *, as_json: bool) -> None:
    """A report for a person, or as exactly one JSON object on the last line."""
    if not as_json:
        if report.text:
            print(report.text.rstrip("\n"))
        return
    head = {
        "command": name,
        "ok": report.ok,
        "out": str(report.out) if report.out else None,
        "seconds": round(seconds, 3),
    }
    body = {"counts": dict(report.counts), "figures": dict(report.figures), **report.extra}
    from langmill.common.plain import json_line

    print(json_line(head | body))


def _explain(error: BaseException) -> tuple[int, str, str]:
    """Exit code, type and one sentence for whatever went wrong."""
    kind = type(error).__name__
    if isinstance(error, LangmillError):
        return error.exit_code, kind, " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        return 130, "Interrupted", "interrupted"
    if isinstance(error, MemoryError):
        return 1, kind, "not enough memory: use a smaller model, micro_batch_size or max_length"
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename is not None else ""
        advice = " (free some space, then go on with --resume)" if error.errno == errno.ENOSPC else ""
        return 1, kind, f"{place}{error.strerror.lower()}{advice}"
    return 1, kind, f"internal error ({kind}: {error}); run again with --debug to see where, and report it"


def read_settings(call: Call) -> Settings | None:
    """The settings of a call; None for a command that has none. Raises SettingsError and UsageError."""
    row = call.row
    if row.settings is None:
        if words := call.words + call.verbatim:
            raise UsageError(f"'langmill {row.name}' takes no '{words[0]}' (see --help)")
        return None
    from langmill.common.arguments import find, place, sort_words
    from langmill.common.configure import configure

    cls, writes = _class(row), row.name == "generate"
    pairs = row.module not in READERS
    arguments, overrides = sort_words(cls, call.words, COMMON, texts=writes, pairs=pairs)
    given = place(cls, row.positional, arguments + call.verbatim)
    if call.seed is not None and find(cls, "seed"):  # where there is none, nothing is random
        given["seed"] = call.seed
    named = given.keys() | {word.partition("=")[0] for word in overrides}
    asked = {"prompt", "file"} & named or call.config or call.dry_run
    if writes and not asked and not sys.stdin.isatty():
        given["prompt"] = [_piped().removesuffix("\n")]
    return configure(cls, call.config, overrides, **given)


def _piped() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as reason:
        raise UsageError(f"standard input is not UTF-8 ({reason.reason}): convert it first") from None


def _class(row: Command) -> type[Settings]:
    module = importlib.import_module("langmill.common.settings")
    found: type[Settings] = getattr(module, str(row.settings))
    return found


class SettingsCommand(TyperCommand):
    """A typer command that lists its settings in --help, and keeps what stands behind "--" as it is."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        ctx.meta["langmill.verbatim"] = args[end + 1 :]
        return super().parse_args(ctx, args[:end])

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        from langmill.common.configure import resolve

        row = _row(ctx)
        lists = {name: resolve(_class(row), name).is_list for name in row.positional}
        names = [f"{name.upper()}{'...' if lists[name] else ''}" for name in row.positional]
        options = "[--NAME VALUE]..." if row.module in READERS else "[--NAME VALUE | NAME=VALUE]..."
        return [*names, options if row.settings else "[OPTIONS]"]

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        row = _row(ctx)
        for title, lines in _sections(row) if row.settings else []:
            with formatter.section(title):
                formatter.write_dl(lines)


def _row(ctx: Any) -> Command:
    return next(row for row in COMMANDS if row.name == ctx.command_path.partition(" ")[2])


def _sections(row: Command) -> list[tuple[str, list[tuple[str, str]]]]:
    """The settings of a command for --help, a section a group: `--name TYPE`, what it is for, its default."""
    from langmill.common.configure import keys

    known = [key for key in keys(_class(row)) if key.name not in COMMON]
    last = [key.path[-1] for key in known]
    sections: dict[str, list[tuple[str, str]]] = {}
    for key in known:
        group = (
            f"{key.path[0]} (in full and in YAML: {key.path[0]}.NAME)" if len(key.path) > 1 else "Settings"
        )
        unique = last.count(key.path[-1]) == 1 or len(key.path) == 1
        left = "--" + (key.path[-1] if unique else key.name).replace("_", "-")
        if key.name in row.positional:
            group, left = "Arguments", key.name.upper()
        elif not key.is_flag:
            left += " " + _type(key)
        obvious = key.default is None or key.default is False or key.default == []
        default = " [required]" if key.required else "" if obvious else f" [default: {key.default}]"
        sections.setdefault(group, []).append((left, key.description + default))
    return list(sections.items())


def _type(key: Key) -> str:
    names = {int: "N", float: "X", str: "TEXT", Path: "PATH", bool: "true|false"}
    return "|".join(
        "TEXT" if key.is_list else names.get(kind, str(kind)) for kind in key.kinds if kind is not None
    )


def build() -> typer.Typer:
    """The typer application: every row of COMMANDS as a command that returns its Call."""
    plain: dict[str, Any] = {"rich_markup_mode": None, "add_completion": False}
    about = "A folder of text becomes a private language model. Start with: langmill quickstart"
    app = typer.Typer(**plain, help=about, context_settings={"help_option_names": ["-h", "--help"]})
    groups = {name: typer.Typer(**plain, help=text) for name, text in GROUPS.items()}
    for row in COMMANDS:
        group, _, name = row.name.rpartition(" ")
        if group and groups[group] not in [known.typer_instance for known in app.registered_groups]:
            app.add_typer(groups[group], name=group)
        place = groups[group] if group else app
        place.command(
            name, cls=SettingsCommand, help=row.help, context_settings={"ignore_unknown_options": True}
        )(_command(row))
    app.callback()(_program)
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"langmill {__version__}")
        raise typer.Exit


def _program(
    version: Annotated[
        bool, typer.Option("--version", help="print the version", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def _command(row: Command) -> Callable[..., Call]:
    def command(
        ctx: typer.Context,
        words: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
        config: Annotated[
            Path | None, typer.Option(metavar="FILE", help="YAML file of the settings below")
        ] = None,
        seed: Annotated[int | None, typer.Option(metavar="N", help="fixes every random choice")] = None,
        as_json: Annotated[
            bool, typer.Option("--json", help="end with one JSON object on standard output")
        ] = False,
        debug: Annotated[
            bool, typer.Option("--debug", help="show the traceback of an error, and warnings")
        ] = False,
        quiet: Annotated[bool, typer.Option("--quiet", help="show no progress")] = False,
        dry_run: Annotated[
            bool,
            typer.Option(
                "--dry-run",
                help="print the settings (pretrain: the plan, finetune: three examples, data forget: what would "
                "go), and stop",
            ),
        ] = False,
    ) -> Call:
        return Call(row, words or [], ctx.meta["langmill.verbatim"], config, seed, quiet, dry_run)

    return command
