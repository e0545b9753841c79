"""Conversations to an adapter, end to end on a tiny model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from langmill.common.configure import configure
from langmill.common.errors import DataError, ModelError, SettingsError, TrainingError, UsageError
from langmill.common.settings import FinetuneSettings, MergeSettings, ModelSettings
from langmill.families.folder import load, outline, save
from langmill.jobs import finetune, memory, merge
from langmill.jobs.pretrain import fresh
from langmill.jobs.size import config_for
from langmill.text.tokenizer import Tokenizer

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FEW = (
    "max_steps=8",
    "micro_batch_size=2",
    "dtype=float32",
    "compile=false",
    "threads=1",
    "save_every=3",
    "holdout=0.2",
)


def chats(count: int = 40) -> list[dict[str, Any]]:
    """Rows of every form, each with its own words."""
    rows: list[dict[str, Any]] = []
    for i in range(count):
        asked, answer = f"How much is item {i}?", f"Item {i} costs {i * 3} euros."
        rows.append(
            [
                {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]},
                {"conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]},
                {"instruction": asked, "input": "", "output": answer},
                {"prompt": asked, "completion": " " + answer},
            ][i % 4]
        )
    return rows


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    tokenizer = Tokenizer.train([json.dumps(row) for row in chats()], 400).with_template(TEMPLATE)
    save(fresh(config_for(ModelSettings(size="200k"), tokenizer.vocab_size, 256), 0), tokenizer, folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in chats()), "utf-8")
    return file


def settings(base: Path, data: Path, out: Path, *more: str, **named: Any) -> FinetuneSettings:
    return configure(
        FinetuneSettings, None, [*FEW, *more], model=str(base), data=[str(data)], out=out, **named
    )


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_conversations_become_an_adapter_or_a_model(
    base: Path, data: Path, tmp_path: Path, method: str
) -> None:
    out = tmp_path / "mine"
    report = finetune.run(settings(base, data, out, method=method), quiet=True)
    f = report.figures
    assert f["loss"] < f["before_loss"] and 0.1 < f["trained_share"] < 0.9
    assert (f["trainable_parameters"] == f["parameters"]) == (method == "full")
    assert report.counts["examples"] + report.counts["held_out_examples"] == 40
    page = (tmp_path / "mine.run" / "report.html").read_text("utf-8")
    assert "Answers before and after" in page and "http" not in page.split("<main>")[1]
    assert (out / "chat_template.jinja").read_text() == TEMPLATE
    model, tokenizer = load(out)
    assert tokenizer is not None and tokenizer.chat_template == TEMPLATE
    if method != "full":
        merge.run(configure(MergeSettings, None, [], adapter=str(out), out=tmp_path / "merged"), quiet=True)
        merged, _ = load(tmp_path / "merged")
        ids = torch.arange(1, 40)[None]
        torch.testing.assert_close(merged(ids), model(ids), rtol=1e-4, atol=1e-4)
        assert outline(out)[0] == outline(base)[0]
        with pytest.raises(ModelError, match="is an adapter: `langmill merge"):
            finetune.run(settings(out, data, tmp_path / "again", method=method), quiet=True)
    with pytest.raises(UsageError, match="exists"):
        finetune.run(settings(base, data, out, method=method), quiet=True)


def test_a_killed_run_goes_on_to_the_same_bytes(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finetune.run(settings(base, data, tmp_path / "whole"), quiet=True)
    real = finetune.fit

    def killed(*arguments: Any, **named: Any) -> Any:
        def stop(step: int, state: Any) -> None:
            if step == 5:
                raise KeyboardInterrupt

        return real(*arguments, **named, hooks=[stop])

    monkeypatch.setattr(finetune, "fit", killed)
    with pytest.raises(KeyboardInterrupt):
        finetune.run(settings(base, data, tmp_path / "cut"), quiet=True)
    checkpoint = next((tmp_path / "cut.run" / "checkpoints").glob("step-*/model.safetensors"))
    assert checkpoint.stat().st_size < (base / "model.safetensors").stat().st_size / 2  # the adapter alone
    monkeypatch.setattr(finetune, "fit", real)
    finetune.run(settings(base, data, tmp_path / "cut", resume=True), quiet=True)
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]
    assert (
        "finished already"
        in finetune.run(settings(base, data, tmp_path / "cut", resume=True), quiet=True).text
    )


def test_steps_time_and_memory_are_told_before_the_run(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune.run(settings(base, data, tmp_path / "m", "train.max_length=64", "max_steps=2"))
    told = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("about "))
    assert re.fullmatch(
        r"about 2 steps of 1 × 2 × 64 tokens, \S+ \w+; memory about \S+ MB of \S+ GB", told
    ), told


def test_the_preview_shows_what_is_trained(base: Path, data: Path, tmp_path: Path) -> None:
    text = finetune.run(settings(base, data, tmp_path / "no", preview=2), quiet=True).text
    assert (
        "⟦Item 0 costs 0 euros.<|im_end|>⟧" in text and "⟦How" not in text and not (tmp_path / "no").exists()
    )


def test_rows_over_length_follow_the_policy_and_are_counted(base: Path, data: Path, tmp_path: Path) -> None:
    long = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "word " * 300}]}
    with open(data, "a", encoding="utf-8") as file:
        file.write(json.dumps(long) + "\n" + '{"messages": []}\nno json\n' + '{"text": "x"}\n')
    _, tokenizer = load(base)
    assert tokenizer is not None
    for policy, kept in (("drop", 40), ("truncate", 41), ("split", 41)):
        given = settings(base, data, tmp_path / policy, "train.max_length=64", too_long=policy)
        ready = finetune.prepare(given, tokenizer, 256, tmp_path / "errors.jsonl", quiet=True)
        assert len(ready.examples) == kept
        ledger = ready.ledger.as_dict()
        dropped = {reason: count["documents"] for reason, count in ledger["dropped"].items()}
        assert dropped.pop("longer than train.max_length", 0) == 41 - kept
        assert dropped == {"not a usable conversation": 2, "broken JSON": 1}
        assert (
            ledger["read"]["documents"]
            == 44
            == ledger["kept"]["documents"] + sum(dropped.values()) + 41 - kept
        )
    assert ready.counted == {"truncated": 0, "split": 1}


def test_a_template_that_ends_no_answer_is_refused(base: Path, data: Path, tmp_path: Path) -> None:
    row = json.loads(data.read_text("utf-8").splitlines()[0])
    data.write_text(json.dumps(row) + "\n", "utf-8")
    (endless := tmp_path / "endless.jinja").write_text(TEMPLATE.replace("<|im_end|>", "."), "utf-8")
    with pytest.raises(DataError, match="would not learn to stop: .* ends no answer by <|"):
        finetune.run(settings(base, data, tmp_path / "m", template=endless), quiet=True)
    shown = finetune.run(settings(base, data, tmp_path / "no", template=endless, preview=1), quiet=True).text
    assert "trained, without a token that stops the model\n" in shown
    endless.write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"endless.jinja is not UTF-8 \(byte 0\)"):
        finetune.run(settings(base, data, tmp_path / "m", template=endless), quiet=True)


def test_settings_that_nothing_reads_are_refused(base: Path, data: Path, tmp_path: Path) -> None:
    for method, given in (("full", "lora_r=4"), ("full", "use_dora=true"), ("lora", "prefer.beta=0.3")):
        name = given.partition("=")[0].rpartition(".")[2]
        with pytest.raises(SettingsError, match=rf"{name} is for .*task=chat, method={method}"):
            finetune.run(settings(base, data, tmp_path / "no", given, method=method), quiet=True)


def test_what_was_left_out_is_told_at_the_end_and_in_the_preview(
    base: Path, data: Path, tmp_path: Path
) -> None:
    data.write_text("no json\n" + data.read_text("utf-8"), "utf-8")
    told = r"left out.*: 1 broken JSON \(such as .*chats.jsonl:1: Expecting value"
    assert re.search(told, finetune.run(settings(base, data, tmp_path / "m", "max_steps=1"), quiet=True).text)
    assert re.search(told, finetune.run(settings(base, data, tmp_path / "no", preview=1), quiet=True).text)


def test_too_little_memory_names_the_next_lever(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free", lambda device: 1000)
    for method, words in (
        ("full", "choose --method lora, a smaller"),
        ("lora", "choose a smaller train.max_length"),
    ):
        with pytest.raises(TrainingError, match=f"1 kB are free: {words}"):
            finetune.run(settings(base, data, tmp_path / method, method=method), quiet=True)


def test_bad_input_is_named(base: Path, data: Path, tmp_path: Path) -> None:
    data.write_text('{"messages": [{"role": "assistant", "content": "I begin"}]}\n')
    with pytest.raises(
        DataError, match=r"no conversation is left.*1 not a usable.*an answer before anybody asked"
    ):
        finetune.run(settings(base, data, tmp_path / "a"), quiet=True)
    with pytest.raises(SettingsError, match=r"no layer is called wrong; there are down_proj"):
        data.write_text(json.dumps(chats()[0]) + "\n")
        finetune.run(settings(base, data, tmp_path / "b", "holdout=0", lora_targets=["wrong"]), quiet=True)
    with pytest.raises(ModelError, match="no adapter_config"):
        merge.run(configure(MergeSettings, None, [], adapter=str(base), out=tmp_path / "m"), quiet=True)
    with pytest.raises(UsageError, match="does not exist"):
        finetune.run(settings(base, tmp_path / "none.jsonl", tmp_path / "c"), quiet=True)
