"""Conversations survive crashes, stay trees, stay their owner's, and are gone when deleted."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from langmill.common.errors import DataError, UsageError
from langmill.common.settings import ServeSettings
from langmill.serve import history as module
from langmill.serve.errors import Refused
from langmill.serve.history import History, Message, default_file, migrate, open_history


class Trees(RuleBasedStateMachine):
    """Whatever is added in whatever order: each conversation is a forest of users' messages and answers in turn."""

    @initialize()
    def start(self) -> None:
        self.history = History(None)
        self.ids = {self.history.make(owner).id: owner for owner in ("", "ann", "ann")}
        self.kept: dict[str, dict[int, Message]] = {id: {} for id in self.ids}

    @rule(data=st.data(), role=st.sampled_from(["user", "assistant"]), content=st.text(max_size=5))
    def add(self, data: Any, role: str, content: str) -> None:
        id = data.draw(st.sampled_from(sorted(self.ids)))
        everything = sorted(number for kept in self.kept.values() for number in kept)
        parent = data.draw(st.sampled_from([None, 99, *everything]))
        above = self.kept[id].get(parent)  # None where it is no message of this conversation
        fits = (above is not None and above.role != role) or (parent is None and role == "user")
        message = Message(role, content, parent, settings={"seed": 1})
        if fits:
            added = self.history.add(self.ids[id], id, message)
            assert (added.content, added.parent, added.settings) == (content, parent, {"seed": 1})
            self.kept[id][added.number] = added
        else:
            with pytest.raises(Refused):
                self.history.add(self.ids[id], id, message)

    @invariant()
    def all_is_there(self) -> None:
        for id, owner in self.ids.items():
            assert {one.number: one for one in self.history.messages(owner, id)} == self.kept[id]
            for number, message in self.kept[id].items():
                path = self.history.path(owner, id, number)
                assert [one.role for one in path] == ["user", "assistant"] * (len(path) // 2) + ["user"] * (
                    len(path) % 2
                )
                assert path[-1] == message and path[0].parent is None
                assert all(below.parent == above.number for above, below in pairwise(path))
            with pytest.raises(Refused):
                self.history.messages("bob", id)


TestTrees = Trees.TestCase
TestTrees.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)

CHILD = """
import sys
from pathlib import Path
from langmill.serve.history import History, Message
history = History(Path(sys.argv[1]))
id = history.make("").id
parent = None
for turn in range(10_000):
    kept = history.add("", id, Message(("user", "assistant")[turn % 2], f"turn {turn}", parent))
    parent = kept.number
    print(id, kept.number, flush=True)
"""


def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    file = tmp_path / "history.sqlite"
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(file)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    lines = [child.stdout.readline() for _ in range(40)]
    child.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
    lines += child.stdout.readlines()
    child.wait()
    id, last = lines[-1].split()
    history = History(file)
    told = {int(line.split()[1]) for line in lines}
    there = [one.number for one in history.messages("", id)]
    assert told <= set(there) and len(there) <= len(told) + 1
    assert [one.content for one in history.path("", id, int(last))] == [f"turn {n}" for n in range(len(told))]
    assert history.add("", id, Message("user", "on", None)).number > int(last)


def test_owners_do_not_meet(tmp_path: Path) -> None:
    history = History(tmp_path / "h.sqlite")
    id = history.make("ann").id
    number = history.add("ann", id, Message("user", "secret")).number
    assert [one.id for one in history.all("ann")[0]] == [id]
    assert history.all("bob") == history.all("") == history.all("bob", "secret") == ([], False)
    for call in (
        lambda: history.find("bob", id), lambda: history.rename("bob", id, "x"), lambda: history.delete("bob", id),
        lambda: history.messages("", id), lambda: history.path("bob", id, number),
        lambda: history.likely("bob", id, number),
        lambda: history.add("bob", id, Message("user", "x")),
    ):  # fmt: skip
        with pytest.raises(Refused, match="no conversation") as refused:
            call()
        assert refused.value.status == 404
    assert [one.content for one in history.messages("ann", id)] == ["secret"]


def test_titles_search_and_order() -> None:
    history = History(None)
    first, second = history.make("").id, history.make("", "Recipes").id
    history.add("", first, Message("user", "春眠不觉晓\n" + "word " * 30))
    assert (
        history.find("", first).title.startswith("春眠不觉晓 word")
        and len(history.find("", first).title) <= 60
    )
    history.add("", second, Message("user", "How do I bake STRASSE 100%?"))
    assert history.find("", second).title == "Recipes"
    assert [one.id for one in history.all("")[0]] == [second, first]
    for search, found in (("不觉", first), ("straße", second), ("100%", second), ("RECIPES", second)):
        assert [one.id for one in history.all("", search)[0]] == [found]
    assert history.all("", "10_%") == ([], False)
    assert history.rename("", first, "Poems").title == "Poems"
    page, more = history.all("", limit=1)
    rest, end = history.all("", offset=1, limit=1)
    assert ([page[0].id, rest[0].id], more, end) == ([second, first], True, False)


def test_one_that_nobody_said_anything_in_is_not_listed_and_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = History(tmp_path / "h")
    empty, titled, used = history.make("").id, history.make("", "Plans").id, history.make("").id
    history.add("", used, Message("user", "x"))
    assert {one.id for one in history.all("")[0]} == {titled, used}
    assert History(tmp_path / "h").find("", empty).id == empty
    monkeypatch.setattr(module, "EMPTY_SECONDS", -1)
    later = History(tmp_path / "h")
    with pytest.raises(Refused):
        later.find("", empty)
    assert later.find("", titled) and later.find("", used)


def test_deleted_means_gone_from_the_disk(tmp_path: Path) -> None:
    file = tmp_path / "h.sqlite"
    history = History(file)
    id, other = history.make("").id, history.make("").id
    asked = history.add("", id, Message("user", "the password is swordfish"))
    history.add("", id, Message("assistant", "swordfish indeed", asked.number), [["swordfish", -0.1, []]])
    history.add("", other, Message("user", "stays"))
    written = b"".join(part.read_bytes() for part in tmp_path.iterdir())
    assert b"swordfish" in written and len(history.all("", "swordfish")[0]) == 1
    history.delete("", id)
    left = b"".join(part.read_bytes() for part in tmp_path.iterdir())
    assert b"swordfish" not in left and b"stays" in left and not history.all("", "swordfish")[0]
    with pytest.raises(Refused):
        history.likely("", id, asked.number)
    assert [one.content for one in history.messages("", other)] == ["stays"]


def test_probabilities_are_kept_beside_a_message() -> None:
    history = History(None)
    id = history.make("").id
    asked = history.add("", id, Message("user", "a"))
    answer = history.add("", id, Message("assistant", "b", asked.number, "m"), [["b", 0.5, [["c", 0.25]]]])
    assert (asked.likely, answer.likely) == (False, True)
    assert history.likely("", id, answer.number) == [["b", 0.5, [["c", 0.25]]]]
    assert history.likely("", id, asked.number) is None


def test_a_private_file_of_our_own_version(tmp_path: Path) -> None:
    file = tmp_path / "new" / "h.sqlite"
    History(file).close()
    if os.name == "posix":
        assert file.stat().st_mode & 0o077 == 0
    db = sqlite3.connect(file)
    db.execute(f"PRAGMA user_version = {len(module.STEPS) + 1}")
    db.close()
    with pytest.raises(UsageError, match="upgrade Langmill"):
        History(file)
    (tmp_path / "text").write_text("no database " * 99, encoding="utf-8")
    with pytest.raises(DataError, match="move it away"):
        History(tmp_path / "text")
    sqlite3.connect(tmp_path / "other").execute("CREATE TABLE a (b)")
    with pytest.raises(DataError, match="another program's"):
        History(tmp_path / "other")
    with pytest.raises(UsageError, match="give another --history"):
        History(tmp_path / "text" / "below")


def test_a_later_version_keeps_what_is_there_or_changes_nothing(tmp_path: Path) -> None:
    db = sqlite3.connect(tmp_path / "h", isolation_level=None)
    migrate(db, ["CREATE TABLE a (b); INSERT INTO a VALUES (1)"], "h")
    later = ["never run", "ALTER TABLE a ADD c DEFAULT 2"]
    with pytest.raises(sqlite3.Error):
        migrate(db, [*later, "no SQL"], "h")
    assert db.execute("SELECT * FROM a").fetchall() == [(1,)]
    migrate(db, later, "h")
    assert db.execute("SELECT * FROM a").fetchall() == [(1, 2)]
    migrate(db, later, "h")


def test_threads_and_processes_take_turns(tmp_path: Path) -> None:
    first, second = History(tmp_path / "h"), History(tmp_path / "h")
    id = first.make("").id

    def write(history: History) -> None:
        for _ in range(10):
            history.add("", id, Message("user", "x"))

    threads = [threading.Thread(target=write, args=(one,)) for one in (first, second, first)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(second.messages("", id)) == 30


def test_a_search_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looking, go_on, held = threading.Event(), threading.Event(), module._holds

    def slow(text: str, search: str) -> bool:
        looking.set()
        return go_on.wait(60) and held(text, search)

    monkeypatch.setattr(module, "_holds", slow)
    history = History(tmp_path / "h")
    id = history.make("").id
    history.add("", id, Message("user", "a needle"))
    with ThreadPoolExecutor() as others:
        found = others.submit(history.all, "", "needle")
        assert looking.wait(60)
        history.add("", id, Message("user", "more"))
        assert [one.content for one in history.messages("", id)] == ["a needle", "more"] and not found.done()
        go_on.set()
        assert [one.id for one in found.result()[0]] == [id]
    history.close()


def test_where_they_are_kept(tmp_path: Path) -> None:
    assert open_history(ServeSettings(page=False)) is None
    memory = open_history(ServeSettings(history="off"))
    assert memory is not None and memory.file is None
    with pytest.raises(UsageError, match="2 --workers"):
        open_history(ServeSettings(history="off", workers=2))
    kept = open_history(ServeSettings(history=str(tmp_path / "h")))
    assert kept is not None and kept.file == tmp_path / "h" and kept.file.exists()
    for home in ("", "relative"):  # a path that is not whole does not count, as the specification has it
        assert default_file(home).name == "history.sqlite" and default_file(home).is_relative_to(Path.home())
    assert default_file(str(tmp_path)) == tmp_path / "langmill" / "history.sqlite"
