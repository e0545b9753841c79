"""Commands that fail before they began leave the disk as it was; later ones keep the run and say how to go on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from langmill import cli
from langmill.families.folder import save
from langmill.model.config import Head, Learned, ModelConfig, Sinusoidal, StackConfig, Tokens
from langmill.model.init import init_
from langmill.model.transformer import Transformer
from langmill.text.tokenizer import Tokenizer

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
QUICK = "train.max_steps=4 train.dtype=float32 train.compile=false train.threads=1 --holdout 0.2".split()
SENTENCES = [f"the {word} ship number {i}" for i in range(12) for word in ("old", "red")]
ROWS: dict[str, list[Any]] = {
    "chat": [{"prompt": text, "completion": f" {text}"} for text in SENTENCES],
    "prefer": [{"prompt": text, "chosen": "good", "rejected": "bad"} for text in SENTENCES],
    "classify": [{"text": text, "label": text.split()[1]} for text in SENTENCES],
    "tag": [{"tokens": text.split(), "tags": ["O", "B-X", "O", "O", "O"]} for text in SENTENCES],
    "answer": [{"question": "Which?", "context": text, "answers": {"text": [], "answer_start": []}}
               for text in SENTENCES],
    "translate": [{"translation": {"a": text, "b": text.upper()}} for text in SENTENCES],
    "embed": [{"anchor": text, "positive": text.upper()} for text in SENTENCES],
}  # fmt: skip
BAD = {
    "empty.jsonl": b"",
    "blank.jsonl": b"\n  \n\n",
    "foreign.jsonl": json.dumps(ROWS["chat"][0]).encode("utf-16"),
    "other.jsonl": b'{"something": "else"}\n',
    "broken.json": b'[{"text": ',
    "damaged.parquet": b"PAR1 and nothing",
    "one.jsonl": b'{"text": "a", "label": "x"}\n{"text": "b", "label": "x"}\n',
    "numbers.jsonl": b'{"text": 5, "label": "x"}\n{"prompt": 5, "completion": 6, "chosen": 7, "rejected": 8}\n',
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A reader, an encoder-decoder and a decoder, tiny and of random weights."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = Tokenizer.train([json.dumps(ROWS)], 320).with_template(TEMPLATE)
    vocab, bias = tokenizer.vocab_size, frozenset({"q", "k", "v", "o", "mlp"})
    small: dict[str, Any] = {"dim": 16, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 8, "hidden": 32}
    theirs: dict[str, Any] = {**small, "norm": "layer", "activation": "gelu", "gated": False, "bias": bias,
                              "norm_order": "post"}  # fmt: skip
    waves: dict[str, Any] = {**theirs, "norm_eps": 1e-5, "position": Sinusoidal()}
    text = Tokens(vocab, 64, scale=4.0)
    for name, config in {
        "reader": ModelConfig(
            encoder=StackConfig(**theirs, norm_eps=1e-12, position=Learned(), causal=False),
            encoder_input=Tokens(vocab, 64, types=2, norm=True),
            head=Head(vocab, True, True, "gelu", transform_norm=True),
        ),
        "both": ModelConfig(
            encoder=StackConfig(**waves, causal=False), encoder_input=text,
            decoder=StackConfig(**waves, cross=True),
            decoder_input=Tokens(vocab, 64, start=tokenizer.pad_id, scale=4.0),
            head=Head(vocab, True, True),
        ),
        "writer": ModelConfig(StackConfig(**small), Tokens(vocab, 64), head=Head(vocab)),
    }.items():  # fmt: skip
        model = Transformer(config)
        init_(model, 0)
        save(model, tokenizer, folder / name)
    yield folder


def base(models: Path, task: str) -> str:
    kind = {"translate": "both", "chat": "writer", "prefer": "writer"}.get(task, "reader")
    return str(models / kind)


def everything(folder: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def failed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command says that must fail."""
    assert cli.run([*words, "--quiet", "--json"]) == 1
    (error,) = (json.loads(capsys.readouterr().out.splitlines()[-1])["error"],)
    assert error["type"] in ("DataError", "TrainingError")
    return str(error["message"])


def earlier(out: Path) -> None:
    """What a finished run left, to be replaced."""
    run = out.with_name(out.name + ".run")
    for file in (
        out / "lineage.json",
        out / "tokenizer.json",
        run / "report.json",
        run / "checkpoints/step-1/w",
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("earlier")
    (run / "lock").touch()


@pytest.mark.parametrize("task", ROWS)
@pytest.mark.parametrize("file", BAD)
def test_finetune(
    task: str, file: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / file).write_bytes(BAD[file])
    words = ["finetune", base(models, task), "--task", task, "--data", str(tmp_path / file), *QUICK, "--out"]
    before = everything(tmp_path)
    message = failed(capsys, *words, str(tmp_path / "new" / "model"))
    assert everything(tmp_path) == before
    assert str(tmp_path / file) in message or "the one label" in message
    if file != "other.jsonl":
        return
    out = tmp_path / "model"
    earlier(out)
    before = everything(tmp_path)
    assert (
        failed(capsys, *words, str(out), "--force") == message
        and everything(tmp_path).keys() == before.keys()
    )
    assert {**everything(tmp_path), "model.run/lock": b""} == {**before, "model.run/lock": b""}


@pytest.mark.parametrize(
    "command",
    [
        ["pretrain", "TEXT", "--out"],
        ["pretrain", "TEXT", "train.objective=masked", "--out"],
        ["pretrain", "TEXT", "train.objective=denoise", "--out"],
        ["tokenizer", "train", "TEXT", "--out"],
        ["quickstart", "--text", "TEXT", "--out"],
        ["data", "shards", "TEXT", "--tokenizer", "MODEL", "--out"],
    ],
)
@pytest.mark.parametrize("content", [{}, {"a.txt": b""}, {"a.txt": b"\xff\xfe\xff"}, {"b.pdf": b"%PDF"}])
def test_commands_that_read_text(
    command: list[str],
    content: dict[str, bytes],
    models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "texts").mkdir()
    for name, data in content.items():
        (tmp_path / "texts" / name).write_bytes(data)
    names = {"TEXT": str(tmp_path / "texts"), "MODEL": str(models / "writer")}
    words = [names.get(word, word) for word in command]
    before = everything(tmp_path)
    failed(capsys, *words, str(tmp_path / "new" / "model"))
    assert everything(tmp_path) == before
    earlier(tmp_path / "model")
    before = everything(tmp_path)
    failed(capsys, *words, str(tmp_path / "model"), "--force")
    assert {**everything(tmp_path), "model.run/lock": b""} == {**before, "model.run/lock": b""}


def test_a_run_that_does_not_fit_into_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its shards are made by then."""
    (tmp_path / "text.txt").write_text("The ship is red. " * 99)
    earlier(tmp_path / "model")
    before = everything(tmp_path)
    words = ["pretrain", str(tmp_path / "text.txt"), "--size", "tiny", "train.micro_batch_size=1000000000"]
    assert "memory" in failed(capsys, *words, "--out", str(tmp_path / "model"), "--force")
    assert {**everything(tmp_path), "model.run/lock": b""} == {**before, "model.run/lock": b""}


@pytest.mark.parametrize("task", ["chat", "classify", "prefer"])
def test_a_later_failure_keeps_the_run(
    task: str,
    models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from langmill.train import loop

    original = loop._Run.evaluate

    def evaluate(run: Any) -> None:
        if run.state.step == 3:
            raise MemoryError
        original(run)

    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[task]))
    words = ["finetune", base(models, task), "--task", task, "--data", str(tmp_path / "rows.jsonl"), *QUICK]
    words += ["--out", str(tmp_path / "model"), "train.save_every=1"]
    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "evaluate", evaluate)
        assert cli.run([*words, "--quiet", "--json"]) == 1
    capsys.readouterr()
    assert not (tmp_path / "model").exists() and (tmp_path / "model.run" / "choices.json").exists()
    assert cli.run([*words, "--quiet", "--json", "--resume"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["counts"]["steps"] == 4


def test_a_loss_that_is_not_finite_says_how_to_go_on(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS["classify"]))
    earlier(tmp_path / "model")
    words = [
        "finetune",
        base(models, "classify"),
        "--task",
        "classify",
        "--data",
        str(tmp_path / "rows.jsonl"),
    ]
    words += [
        *QUICK,
        "--out",
        str(tmp_path / "model"),
        "train.learning_rate=1e38",
        "train.max_grad_norm=0",
        "--force",
    ]
    assert "--resume" in failed(capsys, *words)
    assert not (tmp_path / "model").exists() and (tmp_path / "model.run" / "choices.json").exists()
    assert not (tmp_path / "model.run" / "replaced").exists()
    assert not (tmp_path / "model.run" / "report.json").exists()
