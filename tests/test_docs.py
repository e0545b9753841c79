"""Every command and every piece of Python that the readmes print is run here, on little text and with few steps."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from langmill import cli
from langmill.families.folder import load, save
from langmill.model.config import Head, Learned, ModelConfig, Sinusoidal, StackConfig, Tokens
from langmill.model.init import init_
from langmill.model.transformer import Transformer
from langmill.text.tokenizer import Tokenizer
from langmill.text.training import MARKS

ROOT = Path(__file__).parent.parent

README, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
BUDGET = "size=100k tokenizer.vocab_size=300 train.max_steps=2 train.max_length=64 train.micro_batch_size=2".split()
LITTLE = {
    "pretrain": [*BUDGET, "--threads", "1"],
    "plan": ["--no-probe"],
    "generate": ["--max-new-tokens", "4"],
    "translate": ["--max-new-tokens", "4"],
    "evaluate": ["--resamples", "20"],
    "finetune": [*"train.max_steps=2 train.dtype=float32 train.compile=false".split(), "--threads", "1"],
}
REWARD = """
def score(prompts, completions, wanted, **fields):
    return [float(word in text) for word, text in zip(wanted, completions)]
"""
TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
TEMPLATE = "{% for m in messages %}" + TURN + "{% endfor %}<|im_start|>assistant\n"


def blocks(page: Path, language: str = "") -> list[str]:
    """The fenced blocks of a page in this language."""
    return re.findall(
        rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def commands(page: Path) -> list[list[str]]:
    """The words of every `langmill` line, comments left out."""
    lines = [line for block in blocks(page) for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("langmill ")]


def shortened(words: list[str]) -> list[str]:
    """The command with less to do; a run that goes on from a model or a run takes its shape from there."""
    extra = LITTLE.get(words[0], []) if words[:2] != ["generate", "ENCODER"] else []
    if "--from" in words:
        extra = [word for word in extra if "size=" not in word or "batch" in word]
    if "--preview" in words:
        extra = []
    if "reinforce" in words:
        extra = [*extra, *"prompts_per_step=1 num_generations=2 max_completion_length=4".split()]
    return [*words, *([] if "--resume" in words else extra), "--quiet"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands take as given: texts, held-out rows, and a model that was made before."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "texts").mkdir()
    rows = [f"Document {i}: the river is long, and 很久以前 there were {i * 7} boats." for i in range(80)]
    for i, row in enumerate(rows):
        (folder / "texts" / f"{i:02}.txt").write_text(row, encoding="utf-8")
    (folder / "heldout.jsonl").write_text(
        "".join(json.dumps({"text": row}) + "\n" for row in rows[:9]), "utf-8"
    )
    before = [str(folder / "texts"), "--out", str(folder / "before"), *LITTLE["pretrain"], "--quiet"]
    assert cli.run(["pretrain", *before]) == 0
    model, tokenizer = load(folder / "before")
    save(model, tokenizer, folder / "MODEL")
    (folder / "MODEL" / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    chats = [
        [{"role": "user", "content": f"Boat {i}?"}, {"role": "assistant", "content": f"No {i}."}]
        for i in range(9)
    ]
    pairs = [{"prompt": f"Boat {i}?", "chosen": f" No {i}.", "rejected": " Go."} for i in range(9)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    (folder / "chats.jsonl").write_text(
        "".join(json.dumps({"messages": chat}) + "\n" for chat in chats), "utf-8"
    )
    prompts = [{"prompt": f"Boat {i}?", "wanted": "No"} for i in range(9)]
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in prompts), encoding="utf-8"
    )
    (folder / "rules.py").write_text(REWARD, encoding="utf-8")
    task_inputs(folder)
    return folder


def task_inputs(folder: Path) -> None:
    """Rows for the tasks, and an encoder and an encoder-decoder of random weights that read them."""
    rows: dict[str, list[dict[str, object]]] = {
        "labels": [{"text": f"{kind} {i} went by", "label": kind} for i in range(12) for kind in ("boat", "cow")],
        "names": [{"tokens": ["Ada", "saw", f"boat{i}"], "tags": ["B-PER", "O", "O"]} for i in range(12)],
        "squad": [
            {"question": "Who?", "context": f"It was Ada, at {i}.", "answers": {"text": ["Ada"], "answer_start": [7]}}
            for i in range(12)
        ],
        "translations": [{"translation": {"en": f"{i} boats", "de": f"{i} Boote"}} for i in range(12)],
        "choices": [{"question": f"Boat {i}?", "choices": ["yes", "no"], "answer": i % 2} for i in range(12)],
        "alike": [{"anchor": f"boat {i}", "positive": f"the boat of number {i}"} for i in range(12)],
    }  # fmt: skip
    for name, own in rows.items():
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in own), encoding="utf-8"
        )
    tokenizer = Tokenizer.train(
        [json.dumps(row) for own in rows.values() for row in own], 300, specials=MARKS["mask"]
    )
    vocab, shape = (
        tokenizer.vocab_size,
        {"norm": "layer", "activation": "gelu", "gated": False, "norm_order": "post"},
    )
    every = frozenset({"q", "k", "v", "o", "mlp"})
    reads = StackConfig(
        32, 1, 2, 2, 16, 48, position=Learned(), norm_eps=1e-12, causal=False, bias=every, **shape
    )  # type: ignore[arg-type]
    source = StackConfig(32, 1, 2, 2, 16, 48, position=Sinusoidal(), causal=False, bias=every, **shape)  # type: ignore[arg-type]
    tokens = Tokens(vocab, 64, types=2, norm=True)
    encoder = ModelConfig(encoder=reads, encoder_input=tokens, head=Head(vocab, True, True, "gelu", True))
    writer = ModelConfig(
        encoder=source, encoder_input=Tokens(vocab, 64), decoder=replace(source, causal=True, cross=True),
        decoder_input=Tokens(vocab, 64, start=tokenizer.pad_id), head=Head(vocab, True, True),
    )  # fmt: skip
    for name, config in (("ENCODER", encoder), ("WRITER", writer)):
        model = Transformer(config)
        init_(model, 0)
        save(model, tokenizer, folder / name)


def test_every_command_of_the_readme_runs(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    found = commands(README)
    assert {words[0] for words in found} >= {
        "pretrain",
        "plan",
        "generate",
        "evaluate",
        "tokenizer",
        "data",
        "classify",
        "translate",
    }
    monkeypatch.setattr("sys.stdin", io.StringIO("Boat 1?\n"))  # what `chat` is told
    for words in found:
        if words[0] == "serve":
            serve(words)
        else:
            assert cli.run(shortened(words)) == 0, (words, capfd.readouterr().err)
    for block in blocks(README, "python") + blocks(CHINESE, "python"):
        subprocess.run([sys.executable, "-c", block], cwd=place, check=True, capture_output=True, timeout=300)
        assert (place / "copy" / "config.json").is_file()
        (place / "copy").rename(place / f"copy-{len(list(place.iterdir()))}")


def serve(words: list[str]) -> None:
    """Start a server as the page has it, on a free port, and stop it once it answers."""
    command = [sys.executable, "-m", "langmill", *words, "--port", "0", "--history", "off"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if "answers at http://127.0.0.1:" in line:
                process.terminate()
        assert process.wait() == 0, said


def test_both_readmes_print_the_same_commands() -> None:
    texts = ("Once upon a time", "很久以前", "Hallo Welt", "你好，世界")
    plain = [
        [[word for word in words if word not in texts] for words in commands(p)] for p in (README, CHINESE)
    ]
    assert plain[0] == plain[1]
    scripts = [[re.sub(r"\s*#.*", "", line) for line in blocks(p)[0].splitlines()] for p in (README, CHINESE)]
    assert scripts == [["scripts/quickstart", "scripts/test"]] * 2


def test_the_scripts_named_in_the_docs_are_there() -> None:
    pages = [README, CHINESE, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "LOG.md"))]
    named = {
        name for page in pages for name in re.findall(r"`(scripts/[\w/.]+)", page.read_text(encoding="utf-8"))
    }
    assert len(named) >= 4 and all((ROOT / name).is_file() for name in named)
    assert all(os.access(ROOT / name, os.X_OK) for name in named if not Path(name).suffix)
    benches = {
        name
        for page in pages
        for name in re.findall(r"`scripts/bench (\w+)", page.read_text(encoding="utf-8"))
    }
    listed = subprocess.run([ROOT / "scripts/bench"], capture_output=True, text=True, check=True).stdout
    assert benches and all(f"  {name} " in listed for name in benches)
