from __future__ import annotations

import io
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from langmill.apps import chat as app
from langmill.apps import console as consoles
from langmill.apps.commands import COMMANDS, Chat, read_messages
from langmill.apps.console import Console
from langmill.common.errors import DataError, ModelError
from langmill.common.settings import ChatSettings
from langmill.data.chats import read_chats
from langmill.data.pipeline import Ledger
from langmill.infer.generate import generate
from langmill.infer.ready import ready
from langmill.infer.sampling import Sampling
from langmill.text.chat import chat_ids

WINDOW = 256
Make = Callable[..., str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make: Make, template: str) -> str:
    return make(tmp_path_factory.mktemp("models") / "chat", template, WINDOW)


class Said(NamedTuple):
    chat: Chat
    counts: Counter[str]
    shown: str
    notes: str


def converse(
    folder: str, *lines: Any, overflow: Any = "oldest", console: Any = None, **sampling: Any
) -> Said:
    """A conversation of these lines; an exception among them is raised in the place of a line."""
    shown, notes, rest = [], [], list(lines)

    def read(prompt: str) -> str:
        line = rest.pop(0) if rest else EOFError()
        if isinstance(line, BaseException):
            raise line
        return str(line)

    place = Console(read, shown.append, notes.append, True)
    speaker = app.speaker_of(ChatSettings(model=folder, overflow=overflow, device="cpu"))
    chat = Chat((), Sampling(**{"max_new_tokens": 12, **sampling}))
    chat, counts, _ = app.talk(speaker, chat, console(place) if console else place)
    return Said(chat, counts, "".join(shown), "\n".join(notes))


def texts(said: Said) -> list[str]:
    return [message["content"] for message in said.chat.messages]


def test_every_answer_is_as_from_a_fresh_run_of_the_whole_chat(folder: str) -> None:
    said = converse(folder, "/system Be brief.", "Hi", "", "春眠?", "And the dog?")
    messages = said.chat.messages
    assert [m["role"] for m in messages] == ["system", *["user", "assistant"] * 3]
    model, tokenizer = ready(folder, device="cpu")
    answers = [messages[at]["content"] for at in (2, 4, 6)]
    for at, answer in zip((2, 4, 6), answers, strict=True):
        assert answer == "".join(
            generate(model, tokenizer, chat_ids(tokenizer, messages[:at]), max_new_tokens=12)
        )
    assert said.shown == "".join(f"{answer}\n" for answer in answers)
    assert said.counts["turns"] == 3 and 0 < said.counts["reused_tokens"] < said.counts["prompt_tokens"]


def test_messages_of_several_lines(folder: str) -> None:
    lines = ["one \\", "two\\", "three", '"""', "/help", "", "  kept\\", ' """ ', " /no command", "cut\\"]
    said = converse(folder, *lines, max_new_tokens=4)
    assert texts(said)[::2] == ["one \ntwo\nthree", "/help\n\n  kept\\", " /no command", "cut"]
    empty = converse(folder, '"""', "  ", '"""', "Hi", max_new_tokens=4)
    assert "the message is empty" in empty.notes and texts(empty)[0] == "Hi"


def test_retry_undo_and_clear(folder: str) -> None:
    base = converse(folder, "Hi", "And?")
    same = converse(folder, "Hi", "And?", "/retry")
    assert same.chat.messages == base.chat.messages and "the answer stays the same" in same.notes
    one, two, three = (
        texts(converse(folder, "Hi", "/temperature 1.5", "And?", *["/retry"] * count))[3]
        for count in range(3)
    )
    assert len({one, two, three}) == 3
    undone = converse(folder, "/system S", "Hi", "And?", "/undo", "/undo", "/undo", "/retry")
    assert texts(undone) == ["S"] and undone.counts["errors"] == 2
    assert "taken back: And?" in undone.notes and "nothing to take back" in undone.notes
    assert texts(converse(folder, "/system S", "Hi", "/clear", "/system", "/system")) == []
    assert texts(converse(folder, "/system S", "Hi", "/clear")) == ["S"]


def test_commands_that_are_wrong_change_nothing(folder: str) -> None:
    wrong = [
        "/temprature 1",
        "/",
        "/temperature hot",
        "/temperature -1",
        "/save",
        "/exit now",
        f"/save {os.devnull}",
    ]
    said = converse(folder, "Hi", *wrong, "/TEMPERATURE", "/help", "/exit", "never said")
    assert texts(said) == texts(converse(folder, "Hi")) and said.counts["errors"] == len(wrong)
    for note in (
        "no command /temprature: did you mean /temperature?", "did you mean /help?", "'hot' is no temperature",
        "temperature is -1.0", "/save needs FILE", "/exit stands alone", "the temperature is 0",
        *(row.help for row in COMMANDS),
    ):  # fmt: skip
        assert note in said.notes


def test_a_saved_chat_is_a_row_for_finetune_and_loads_again(folder: str, tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    said = converse(
        folder, "/system Über alles: 春", "Hi", f"/save {tmp_path / 'talk'}", "And?", f"/save {file}"
    )
    assert said.counts["errors"] == 0
    row = json.loads(file.read_text(encoding="utf-8"))
    assert row == {"messages": list(said.chat.messages)}
    [chat] = read_chats([file], Ledger(), lambda row: row)
    assert chat.messages == row["messages"]
    again = converse(folder, "Hello", f"/load {tmp_path / 'talk'}", "More")
    more = converse(folder, "/system Über alles: 春", "Hi", "And?", "More")
    assert again.chat.messages == more.chat.messages
    other = tmp_path / "notes.txt"
    other.write_text("precious", encoding="utf-8")
    refused = converse(folder, f"/save {other}", "Hi", f"/save {other}", f"/save {tmp_path}")
    assert refused.counts["errors"] == 3 and "it is not replaced" in refused.notes
    assert other.read_text(encoding="utf-8") == "precious"


USER, BOT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "is not one row of JSON"),
        (b"\xff", "is not one row of JSON"),
        (b"[" * 100_000, "is not one row of JSON"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "is not one row of JSON"),
        ([USER, BOT], "is not a row"),
        ({"text": "a"}, "is not a row"),
        ({"messages": []}, "does not end with an answer"),
        ({"messages": [USER, BOT, USER]}, "does not end with an answer"),
        ({"messages": [BOT, USER]}, "message 0 is of role 'assistant', and here 'user'"),
        ({"messages": [USER, {"role": "system", "content": "s"}]}, "message 1 is of role 'system'"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "message 1 has no text"),
        ({"messages": [USER, {**BOT, "tool_calls": [{}]}]}, "message 1 calls tools"),
        ({"messages": ["a", "b"]}, "message 0 is not an object"),
        ({"messages": [USER, BOT], "tools": [{}]}, "has tools"),
        (None, "is no file"),
    ],
)
def test_a_file_that_is_no_chat_is_refused(content: Any, said: str, tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(DataError, match=said):
        read_messages(file)


def test_loading_what_is_refused_keeps_the_conversation(folder: str, tmp_path: Path) -> None:
    said = converse(folder, "Hi", f"/load {tmp_path / 'none'}", f"/load {tmp_path}")
    assert said.counts["errors"] == 2 and texts(said)[0] == "Hi"


def test_a_chat_that_outgrows_the_window_leaves_the_oldest_turns_out_and_says_so(folder: str) -> None:
    lines = ["/system S", *(f"number {number} of them" for number in range(12))]
    said = converse(folder, *lines, max_new_tokens=24)
    assert said.counts["errors"] == 0 and len(said.chat.turns) == 24  # nothing is forgotten, only not read
    assert f"of 12 turns, which do not all fit in the {WINDOW} tokens of this model" in said.notes
    speaker = app.speaker_of(ChatSettings(model=folder, device="cpu"))
    messages = said.chat.messages[:-1]
    ids, count = app.fit(speaker, messages, 24)
    starts = [at for at, message in enumerate(messages) if message["role"] == "user"]
    assert ids == chat_ids(speaker.tokenizer, [messages[0], *messages[starts[count] :]])
    assert (
        len(ids) + 24
        <= WINDOW
        < 24 + len(chat_ids(speaker.tokenizer, [messages[0], *messages[starts[count - 1] :]]))
    )
    refused = converse(folder, "Hi", "春" * WINDOW)
    assert refused.counts["errors"] == 1 and texts(refused)[0] == "Hi" and len(refused.chat.messages) == 2
    assert f"and the model has {WINDOW}: shorten it" in refused.notes


def test_overflow_stop_refuses_the_turn_with_both_numbers(folder: str) -> None:
    lines = [f"number {number} of them" for number in range(12)]
    said = converse(folder, *lines, overflow="stop", max_new_tokens=24)
    assert said.counts["left_out"] == 0 < said.counts["errors"] == 12 - said.counts["turns"]
    speaker = app.speaker_of(ChatSettings(model=folder, overflow="stop", device="cpu"))
    needed = len(speaker.check(said.chat.asked(lines[-1]).messages))
    assert (
        f"needs {needed + 24} tokens ({needed} to read, 24 to answer) and the model has {WINDOW}"
        in said.notes
    )


def test_ctrl_c_stops_an_answer_and_not_the_program(folder: str) -> None:
    def cut_at(count: int, stoppable: bool = True) -> Callable[[Console], Console]:
        def change(console: Console) -> Console:
            left = [count]

            def show(text: str) -> None:
                left[0] -= 1
                if left[0] == 0:
                    raise KeyboardInterrupt
                console.show(text)

            return Console(console.read, show, console.note, stoppable)

        return change

    whole = texts(converse(folder, "Hi"))[1]
    said = converse(folder, "Hi", KeyboardInterrupt(), "And?", console=cut_at(3))
    assert said.counts["stopped"] == 1 and "(stopped: what is written so far stays)" in said.notes
    partial = texts(said)[1]
    assert partial and whole.startswith(partial) and partial != whole
    assert app.HINT in said.notes and len(said.chat.messages) == 4
    model, tokenizer = ready(folder, device="cpu")
    ids = chat_ids(tokenizer, said.chat.messages[:3])
    assert texts(said)[3] == "".join(generate(model, tokenizer, ids, max_new_tokens=12))
    with pytest.raises(KeyboardInterrupt):
        converse(folder, "Hi", console=cut_at(3, stoppable=False))


def test_a_model_without_a_template_or_with_one_that_refuses(
    make: Make, template: str, folder: str, tmp_path: Path
) -> None:
    bare = make(tmp_path / "bare")
    with pytest.raises(ModelError, match="no chat template.*use `langmill generate`"):
        app.run(ChatSettings(model=bare, device="cpu"))
    strict = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + template
    )
    said = converse(make(tmp_path / "strict", strict), "Hi", "/system Be brief.", "And?", max_new_tokens=4)
    assert "no system role" in said.notes and len(said.chat.messages) == 4


def test_a_pipe_is_a_conversation_that_can_be_scripted(folder: str) -> None:
    lines = "Hi\r\n\n/nothing\n\udcff\nAnd?".encode("utf-8", "surrogateescape")
    command = [
        sys.executable,
        "-m",
        "langmill",
        "chat",
        folder,
        "--system",
        "S",
        "--temperature",
        "0",
        "--json",
    ]
    done = subprocess.run(
        [*command, "--max-new-tokens", "12", "--device", "cpu"], input=lines, capture_output=True, timeout=120
    )
    out, err = done.stdout.decode(), done.stderr.decode()
    found = json.loads(out.splitlines()[-1])
    expected = converse(folder, "/system S", "Hi", "And?")
    assert (done.returncode, found["ok"]) == (1, False)  # two lines met an error
    assert found["messages"] == list(expected.chat.messages)
    assert out.startswith(expected.shown) and out.count("\n{") == 1
    assert (found["counts"]["turns"], found["counts"]["errors"], found["command"]) == (2, 2, "chat")
    assert found["figures"]["tokens_per_second"] > 0
    assert "you> And?\n" in err and "not UTF-8 (byte 0)" in err and "no command /nothing" in err


def test_a_quiet_pipe_asks_nothing_and_a_terminal_obeys_no_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo"))
    console = consoles.open_console(quiet=True)
    assert [console.read("you> "), console.read("you> ")] == ["one", "two"] and not console.stoppable
    with pytest.raises(EOFError):
        console.read("you> ")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    consoles.open_console(quiet=True).show("a\x1b[2J\n\x9b春")
    assert capsys.readouterr().out == "a␛[2J\n�春"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_at_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_leaves(
    make: Make, template: str, tmp_path: Path
) -> None:
    endless = make(tmp_path / "endless", template, 1 << 20)
    command = [sys.executable, "-m", "langmill", "chat", endless, "--temperature", "0", "--device", "cpu"]
    master, slave = os.openpty()

    def at_terminal() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a suite that runs in the background ignores it
        os.login_tty(slave)

    process = subprocess.Popen(
        [*command, "--max-new-tokens", "100000"], stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        preexec_fn=at_terminal, env={**os.environ, "TERM": "dumb"},
    )  # fmt: skip
    os.close(slave)
    seen = b""

    def wait_for(text: bytes, again: bytes = b"") -> None:
        """`again`: a key to press each second, as one that comes while the line editor begins or ends is lost."""
        nonlocal seen
        pressed = time.monotonic()
        end = pressed + 100
        while text not in seen:
            now = time.monotonic()
            assert now < end, seen[-500:]
            if again and now > pressed + 1:
                os.write(master, again)
                pressed = now
            if select.select([master], [], [], 0.2)[0]:
                seen += os.read(master, 4096)
        seen = seen.partition(text)[2]

    try:
        wait_for(b"you> ")
        os.write(master, b"Hi\n")
        wait_for(b"Hi\r\n")
        seen += os.read(master, 4096)  # the answer has begun
        os.write(master, b"\x03")
        wait_for(b"(stopped", again=b"\x03")
        wait_for(b"you> ")
        os.write(master, b"\x03")
        wait_for(app.HINT.encode(), again=b"\x03")
        wait_for(b"you> ")
        os.write(master, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)
