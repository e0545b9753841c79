"""Rewards to an adapter, end to end on a tiny model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from langmill.common.configure import configure
from langmill.common.errors import (
    DataError,
    LangmillError,
    ModelError,
    SettingsError,
    TrainingError,
    UsageError,
)
from langmill.common.files import read_json
from langmill.common.settings import FinetuneSettings, ModelSettings
from langmill.families.folder import load, save
from langmill.infer import running
from langmill.jobs import finetune, memory, reinforce
from langmill.jobs.pretrain import fresh
from langmill.jobs.size import config_for
from langmill.text.tokenizer import Tokenizer
from langmill.train import measure

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FEW = (
    "max_steps=6",
    "prompts_per_step=2",
    "num_generations=8",
    "reinforce.beta=0.01",
    "max_completion_length=8",
    "micro_batch_size=3",
    "learning_rate=0.02",
    "dtype=float32",
    "threads=1",
    "save_every=2",
    "holdout=0.3",
)
REWARDS = '''
def low(prompts, completions, completion_ids, wanted, **fields):
    """The share of an answer's tokens that the data wants: those of small numbers."""
    assert len(prompts) == len(completions) == len(wanted) and not fields
    return [sum(id < most for id in ids) / len(ids) for ids, most in zip(completion_ids, wanted)]

def brief(completions):
    return [None if isinstance(c, str) else -0.001 * len(c[0]["content"]) for c in completions]

def short_list(completions, **fields): return [1.0]
def nan(completions, **fields): return [1.0] * (len(completions) - 1) + [float("nan")]
def text(completions, **fields): return ["good"] * len(completions)
def silent(completions, **fields): return [None] * len(completions)
def broken(prompts, completions, **fields): return [1 / (p != "Count to 3:") for p in prompts]
def needy(completions, answer): return [0.0] * len(completions)
async def later(completions, **fields): return [0.0] * len(completions)
'''


def rows(count: int = 20) -> list[dict[str, Any]]:
    """Prompts as text and as messages."""
    asked = [f"Count to {i}:" for i in range(count)]
    return [
        {"prompt": text if i % 2 else [{"role": "user", "content": text}], "wanted": 165}
        for i, text in enumerate(asked)
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    words = [json.dumps(row) for row in rows()]
    tokenizer = Tokenizer.train(words, 330).with_template(TEMPLATE)
    model = fresh(config_for(ModelSettings(size="100k"), tokenizer.vocab_size, 64), 0)
    with torch.no_grad():
        model.tokens.weight.mul_(8)  # so that what adapters change shows in the scores
    save(model, tokenizer, folder)
    return folder


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "matmul_flops", lambda dtype, device: 1e9)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "rewards.py").write_text(REWARDS, "utf-8")
    return write(tmp_path / "prompts.jsonl", rows())


def write(file: Path, values: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in values), "utf-8")
    return file


def settings(
    base: Path, data: Path, out: Path, *more: str, reward: str = "low", **named: Any
) -> FinetuneSettings:
    judge = f"reward={data.with_name('rewards.py')}:{reward}"
    given = {"model": str(base), "data": [str(data)], "out": out, "task": "reinforce", **named}
    return configure(FinetuneSettings, None, [*FEW, judge, *more], **given)


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_rewards_rise_and_the_run_tells_of_it(base: Path, data: Path, tmp_path: Path, method: str) -> None:
    more = ("reinforce.num_iterations=2", "max_steps=20") if method == "full" else ("max_steps=20",)
    report = finetune.run(settings(base, data, tmp_path / "mine", *more, method=method), quiet=True)
    f, counts = report.figures, report.counts
    assert f["reward"] > f["before_reward"] + 0.2, f
    assert (counts["prompts"], counts["held_out_prompts"], counts["steps"]) == (14, 6, 20)
    assert counts["answers"] == (160 if method == "full" else 320)
    folder = tmp_path / "mine.run"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    noted = [row for row in lines if "no_spread" in row]
    assert [row["step"] for row in noted] == list(range(1, 21))
    assert all(row["kl"] >= 0 and 0 <= row["clipped"] <= 1 and 1 <= row["length"] <= 8 for row in noted)
    assert noted[0]["kl"] < 1e-6 and noted[0]["clipped"] == 0 and noted[-1]["kl"] > 1e-4
    assert [row["eval_reward"] for row in lines if "eval_reward" in row][-1] == f["reward"]
    samples = read_json(folder / "samples" / "step-00000020.json", "samples", 1)
    assert len(samples["answers"]) == 8 and {"text", "reward", "stopped"} == set(samples["answers"][0])
    page = (folder / "report.html").read_text("utf-8")
    assert "KL from where it began" in page and "http" not in page.split("<main>")[1]
    assert "earn" in (tmp_path / "mine" / "README.md").read_text("utf-8")
    assert load(tmp_path / "mine")[1] is not None


@pytest.mark.parametrize(
    "more", [(), ("num_iterations=2", "reinforce.beta=0", "mask_truncated_completions=false")]
)
def test_a_killed_run_goes_on_to_the_same_bytes(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    finetune.run(settings(base, data, tmp_path / "whole", *more), quiet=True)
    fit = reinforce.fit

    def killed(*arguments: Any, **named: Any) -> Any:
        def stop(step: int, state: Any) -> None:
            if step == 5:
                raise KeyboardInterrupt

        return fit(*arguments, **{**named, "hooks": [*named["hooks"], stop]})

    cut = ("save_every=3", *more)  # with two steps on the same answers: in their middle
    monkeypatch.setattr(reinforce, "fit", killed)
    with pytest.raises(KeyboardInterrupt):
        finetune.run(settings(base, data, tmp_path / "cut", *cut), quiet=True)
    monkeypatch.setattr(reinforce, "fit", fit)
    report = finetune.run(settings(base, data, tmp_path / "cut", *cut, resume=True), quiet=True)
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1] and report.counts["steps"] == 6
    noted = [
        [
            line
            for line in (tmp_path / f"{name}.run" / "metrics.jsonl").read_text("utf-8").splitlines()
            if "kl" in line
        ]
        for name in ("whole", "cut")
    ]
    assert noted[0] == noted[1]


def test_both_ways_of_writing_draw_the_same(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for refused in (None, "not here"):
        monkeypatch.setattr(running, "refusal", lambda model, refused=refused: refused)
        report = finetune.run(settings(base, data, tmp_path / f"{refused}", "max_steps=2"), quiet=True)
        found.append(report.figures["reward"])
    assert found[0] == found[1]


def test_several_functions_are_weighed_and_told_apart(base: Path, data: Path, tmp_path: Path) -> None:
    more = (
        f"reward={data.with_name('rewards.py')}:brief",
        "reward_weights=2",
        "reward_weights=0.5",
        "max_steps=1",
    )
    report = finetune.run(settings(base, data, tmp_path / "m", *more), quiet=True)
    low, brief = (report.figures[f"reward/{data.with_name('rewards.py')}:{n}"] for n in ("low", "brief"))
    answers = read_json(tmp_path / "m.run" / "after.json", "answers", 1)["answers"]
    asked = {row["prompt"] if isinstance(row["prompt"], str) else "": row for row in rows()}
    chats = sum(answer["prompt"] not in asked for answer in answers)
    assert 0 < chats < len(answers), "brief has nothing to say of those whose prompt is text"
    assert report.figures["reward"] == pytest.approx(2 * low + 0.5 * brief * chats / len(answers))


@pytest.mark.parametrize(
    "reward, words",
    [
        ("short_list", "short_list gives 1 values for 6 completions"),
        ("nan", r"nan gives nan for an answer to .*prompts.jsonl:\d+, which is no finite number"),
        ("text", "text gives 'good' for an answer to"),
        ("silent", "every reward function gives None for an answer to"),
        (
            "broken",
            r"broken fails on an answer to .*prompts.jsonl:4 .*: ZeroDivisionError: .*rewards.py, line \d+",
        ),
        ("needy", "needy takes answer, and the rows have wanted"),
        ("absent", "has no function absent; there are low, brief"),
        ("later", "is async"),
    ],
)
def test_a_function_that_does_wrong_is_named(
    base: Path, data: Path, tmp_path: Path, reward: str, words: str
) -> None:
    with pytest.raises(LangmillError, match=words):
        finetune.run(settings(base, data, tmp_path / "no", "holdout=0.3", reward=reward), quiet=True)
    assert not (tmp_path / "no").exists()


def test_settings_that_contradict_each_other_are_refused(base: Path, data: Path, tmp_path: Path) -> None:
    for wrong, words in (
        ("reward_weights=1,2", "reward_weights has 2 numbers"),
        ("too_long=split", "answered whole or left out"),
        ("compile=true", "compiled code wants one"),
        ("gradient_accumulation_steps=2", "leave it out"),
        ("max_completion_length=64", "there is room for 64 tokens"),
        ("task=chat", "reinforce.reward is for task=reinforce"),
    ):
        wrong = wrong.replace("1,2", "[1, 2]")
        with pytest.raises(SettingsError, match=words):
            finetune.run(
                settings(base, data, tmp_path / "no", wrong, **({"task": "chat"} if "chat" in wrong else {}))
            )
    for reward, words in (("nothing", "names no function"), ("no_such_module:f", "cannot be imported"),
                          ("none.py:f", "none.py is no file")):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            reinforce.find([reward], [])
    with pytest.raises(SettingsError, match="learns from rewards"):
        reinforce.find([], [])


def test_bad_rows_are_named_and_counted(base: Path, data: Path, tmp_path: Path) -> None:
    bad = [
        {"question": "a"},
        {"prompt": ""},
        {"prompt": [{"role": "assistant", "content": "I speak first"}]},
        {"prompt": "a", "completions": "b"},
        {"prompt": "Count " * 60},
    ]
    write(data, [*rows(4), *bad])
    given = settings(base, data, tmp_path / "m")
    _, tokenizer = load(base)
    assert tokenizer is not None
    ready = reinforce.prepare(given, tokenizer, 64, tmp_path / "errors.jsonl", quiet=True)
    dropped = {reason: count.documents for reason, count in ready.ledger.dropped().items()}
    assert dropped == {"not a usable prompt": 4, "prompt too long": 1} and len(ready.prompts) == 4
    ready.ledger.check()
    assert "this one has question" in (tmp_path / "errors.jsonl").read_text("utf-8")
    write(data, bad)
    with pytest.raises(DataError, match="no prompt is left.*4 not a usable prompt"):
        finetune.run(given, quiet=True)


def test_answers_that_never_end_teach_nothing(base: Path, data: Path, tmp_path: Path) -> None:
    more = ("mask_truncated_completions=true", "max_completion_length=1", "temperature=0.01")
    with pytest.raises(LangmillError, match="none of a step's 16 answers ended within"):
        finetune.run(settings(base, data, tmp_path / "no", *more), quiet=True)


def test_memory_is_told_and_checked_before_the_run(
    base: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    finetune.run(settings(base, data, tmp_path / "m", "max_steps=1"))
    assert re.search(
        r"about 1 steps of 6 × 3 × \d+ tokens.*, and \S+ MB to write the answers", capsys.readouterr().err
    )
    needed = []
    monkeypatch.setattr(memory, "check", lambda *given: needed.append(memory.estimate(*given[:4]).total))
    monkeypatch.setattr(memory, "free", lambda device: needed[-1] + 1000)
    for method in ("lora", "full"):
        with pytest.raises(TrainingError, match=r"of them to write the answers, and .* are free: choose"):
            finetune.run(settings(base, data, tmp_path / "no", method=method), quiet=True)


def test_the_preview_shows_prompts_and_fields(base: Path, data: Path, tmp_path: Path) -> None:
    report = finetune.run(settings(base, data, tmp_path / "no", preview=2), quiet=True)
    assert "<|im_start|>user\nCount to 0:<|im_end|>" in report.text and "wanted: 165" in report.text
    assert report.counts == {"prompts": 14, "held_out_prompts": 6} and not (tmp_path / "no").exists()


def test_an_lstm_is_refused(base: Path, data: Path, tmp_path: Path) -> None:
    _, tokenizer = load(base)
    assert tokenizer is not None
    config = config_for(ModelSettings(size="100k", family="lstm"), tokenizer.vocab_size, 64)
    save(fresh(config, 0), tokenizer, tmp_path / "lstm")
    with pytest.raises(ModelError, match="by a Transformer"):
        finetune.run(settings(tmp_path / "lstm", data, tmp_path / "no"), quiet=True)
