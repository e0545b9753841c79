"""`langmill quickstart`: text to model to report within minutes, and the LSTM of the same size beside it.

Both models see the same tokens in the same order for the same number of steps, which a short probe of both sizes so
that the whole command keeps to its time.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from langmill.common.configure import save_settings
from langmill.common.errors import Interrupted
from langmill.common.files import claimed
from langmill.common.metrics import Report
from langmill.common.progress import track
from langmill.common.settings import ModelSettings, QuickstartSettings, TokenizerSettings, TrainSettings
from langmill.data.pipeline import Ledger
from langmill.data.readers import check_paths
from langmill.infer.ready import find_device
from langmill.jobs import corpus as text
from langmill.jobs.corpus import Corpus
from langmill.jobs.heldout import measure, validation
from langmill.jobs.manual import manual
from langmill.jobs.pretrain import export, fresh
from langmill.jobs.probe import Cost, here
from langmill.jobs.quickstart_report import write_report
from langmill.jobs.results import Entrant
from langmill.jobs.resume import BEGAN
from langmill.jobs.size import lstm_of, resolve
from langmill.model.config import Config
from langmill.model.count import parameters
from langmill.train.loop import fit
from langmill.train.objectives import causal

MOST_BYTES = 64_000_000  # of text: more cannot be made use of in minutes
SAMPLE_BYTES = 16_000_000  # of it for the tokenizer
HELD_BYTES = 100_000  # held out at least, if that is not more than a tenth
SECTIONS = 50  # pieces that a short text is cut into at least, so that some can be held out
LENGTH = 256  # tokens in a row
# Measured on the default text (LOG.md): what the Transformer and the LSTM each learn best with in this time.
MODEL = ModelSettings(size="2M")
TRAIN = TrainSettings(
    max_length=LENGTH, micro_batch_size=8, optimizer="muon", learning_rate=0.01, compile=False
)
LSTM_TRAIN = TRAIN.model_copy(update={"learning_rate": 0.01})
LEAST_STEPS = 8
TAIL_SECONDS = 15.0  # after training: scores, samples, report
PROBE_SECONDS = 2.0
SLACK = 0.95  # of the time left is planned
VALIDATED = 4000  # tokens of each validation during training


def run(settings: QuickstartSettings, *, quiet: bool = False) -> Report:
    """Train a small Transformer and an LSTM on the text, compare them on held-out text, and write it all down.

    Figures: bits_per_byte and lstm_bits_per_byte with _interval, their paired difference lstm_behind (bits per byte)
    with its interval, xz_bits_per_byte, gzip_bits_per_byte, tokens_per_second. OUT is the Transformer's folder;
    OUT.run holds report.html, shards, and the LSTM under lstm/model.
    """
    started = time.monotonic()
    check_paths(settings.text)
    with claimed(settings.out, force=settings.force, inputs=settings.text, began=BEGAN) as folder:
        save_settings(settings, folder / "settings.yaml")
        corpus, notes = read(settings, folder, quiet)
        try:
            entrants = compete(settings, corpus, folder, started, quiet)
        except Interrupted as stopped:
            raise Interrupted("stopped before the end: start again with --force", stopped.exit_code) from None
        return write_report(settings, corpus, entrants, notes, time.monotonic() - started)


def read(settings: QuickstartSettings, folder: Path, quiet: bool) -> tuple[Corpus, list[str]]:
    """The text as a corpus, with notes on what was left out."""
    notes: list[str] = []
    data = settings.data
    if settings.text:
        source, size = text.first(text.files(settings.text, data), MOST_BYTES), 0
        with track("reading", unit="B", quiet=quiet) as progress:
            for document in source(Ledger()):
                size += len(document.text.encode("utf-8"))
                progress.advance(len(document.text))
        if size >= MOST_BYTES:
            notes.append(
                f"Only the first {MOST_BYTES // 10**6} MB of your text were used; langmill pretrain takes all of it."
            )
        data = data.model_copy(update={"section_bytes": max(256, min(data.section_bytes, size // SECTIONS))})
        source = text.first(text.files(settings.text, data), MOST_BYTES)
    else:
        with track("reading the Python manual", unit="pages", quiet=quiet) as progress:
            found = manual()
            progress.advance(len(found.documents))
        notes += found.notes
        source, size = text.fixed(found.documents), sum(len(d.text) for d in found.documents)
    holdout = data.holdout
    if "holdout" not in settings.data.model_fields_set:
        holdout = max(holdout, min(0.1, HELD_BYTES / max(1, size)))
    tokenizer = text.train_tokenizer(
        source, TokenizerSettings(sample_bytes=SAMPLE_BYTES), folder / "tokenizer", quiet
    )
    errors, paths = folder / "errors.jsonl", settings.text or []
    shards = text.make_shards(source, tokenizer, folder / "shards", data, errors, quiet, paths)
    return text.corpus(tokenizer, shards, holdout), notes


@dataclass(frozen=True)
class _Plan:
    """One of the two models before it is trained."""

    name: str
    config: Config
    train: TrainSettings
    folder: Path
    cost: Cost


def compete(
    settings: QuickstartSettings, corpus: Corpus, folder: Path, started: float, quiet: bool
) -> list[tuple[Entrant, TrainSettings]]:
    """Probe, train and score both models; the first is the Transformer, whose folder OUT becomes."""
    config, train = resolve(MODEL, TRAIN, corpus.tokenizer.vocab_size)
    recurrent = lstm_of(parameters(config), corpus.tokenizer.vocab_size, LENGTH)
    plans = []
    with track("probing this machine", 2, "models", quiet) as progress:
        for name, shape, chosen, place in (
            ("Transformer", config, train, folder),
            ("LSTM", recurrent, LSTM_TRAIN, folder / "lstm"),
        ):
            batches = corpus.batches(LENGTH, chosen.micro_batch_size or 1, settings.seed)
            cost = here(shape, chosen, batches, 1, settings.seed, min(PROBE_SECONDS, settings.minutes))
            fixed = {"dtype": cost.dtype, "threads": cost.threads}
            plans.append(_Plan(name, shape, chosen.model_copy(update=fixed), place, cost))
            progress.advance()
    left = settings.minutes * 60 - (time.monotonic() - started) - TAIL_SECONDS
    steps = max(LEAST_STEPS, int(SLACK * left / sum(p.cost.step_seconds for p in plans)))
    return [_trained(settings, corpus, plan, steps, quiet) for plan in plans]


def _trained(
    settings: QuickstartSettings, corpus: Corpus, plan: _Plan, steps: int, quiet: bool
) -> tuple[Entrant, TrainSettings]:
    train = plan.train.model_copy(update={"max_steps": steps, "log_every": max(1, steps // 100)})
    device = find_device(train.device)
    model = fresh(plan.config, settings.seed).to(device)
    few = corpus.held_out(VALIDATED)
    outcome = fit(
        model,
        corpus.batches(LENGTH, train.micro_batch_size or 1, settings.seed),
        causal,
        train,
        plan.folder,
        seed=settings.seed,
        validate=validation(corpus, few, LENGTH) if len(few) else None,
        name_of=corpus.shards.id_of,
        quiet=quiet,
    )
    scores = None
    if len(corpus.held):
        scores = measure(model, corpus, corpus.held, LENGTH, settings.seed, quiet, f"scoring the {plan.name}")
    out = settings.out if plan.name == "Transformer" else plan.folder / "model"
    export(out, settings, corpus, model, scores, outcome)
    style = "s0" if plan.name == "Transformer" else "s1"
    return Entrant(plan.name, model, outcome, scores, plan.folder, style), train
