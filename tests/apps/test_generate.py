import json

import pytest
import torch

from langmill.adapt.lora import adapt
from langmill.apps import generate as app
from langmill.common.errors import DataError, ModelError, SettingsError, UsageError
from langmill.common.settings import GenerateSettings, LoRASettings
from langmill.families import folder as folders
from langmill.families.peft import adapters, write_adapter
from langmill.infer import running
from langmill.model.config import LSTMConfig
from langmill.model.recurrent import LSTM
from langmill.text.chat import chat_ids
from langmill.text.infill import SPELT, gap_ids
from langmill.text.tokenizer import Tokenizer

LENGTH = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make):
    return make(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory, make, template):
    return make(tmp_path_factory.mktemp("models") / "chat", template)


def results(folder, *prompts, **settings):
    chosen = GenerateSettings(
        model=folder, prompt=list(prompts), **{"max_new_tokens": 12, "device": "cpu", **settings}
    )
    return app.run(chosen, quiet=True)


def test_one_prompt_streams_to_standard_output_and_its_speed_to_standard_error(folder, capsys):
    report = app.run(GenerateSettings(model=folder, prompt=["The quick"], max_new_tokens=12, device="cpu"))
    out, err = capsys.readouterr()
    [result] = report.extra["results"]
    assert out == result["text"] + "\n" and result["text"]
    assert "tokens/s" in err
    assert report.text == ""
    quiet = results(folder, "The quick")
    assert capsys.readouterr() == ("", "")
    assert quiet.text == result["text"]
    assert quiet.extra["results"] == report.extra["results"]


def test_an_interrupted_stream_ends_its_line(folder, capsys, monkeypatch):
    def cut(*given):
        yield next(whole(*given))
        raise KeyboardInterrupt

    whole = app.written
    monkeypatch.setattr(app, "written", cut)
    with pytest.raises(KeyboardInterrupt):
        app.run(GenerateSettings(model=folder, prompt=["The"], device="cpu"))
    assert capsys.readouterr().out.endswith("\n")


def test_the_end_of_the_context_is_named(folder, capsys):
    app.run(GenerateSettings(model=folder, prompt=["The"], max_new_tokens=LENGTH + 1, device="cpu"))
    assert "ended by the last position of the model" in capsys.readouterr().err


def test_results_are_in_the_order_of_the_prompts_and_as_each_alone(folder, monkeypatch):
    prompts = ["a", "The quick brown fox jumps", "", "day", "春眠", "a"]
    monkeypatch.setattr(running, "SLOTS", 2)
    sampling = {"temperature": 1.0, "seed": 3}
    report = results(folder, *prompts, **sampling)
    together = report.extra["results"]
    assert [result["prompt"] for result in together] == prompts
    for prompt, result in zip(prompts[:5], together, strict=False):
        assert result == results(folder, prompt, **sampling).extra["results"][0]
    assert together[0]["tokens"] != together[5]["tokens"]  # the same prompt again draws anew
    counts = report.counts
    assert (counts["prompts"], counts["tokens"]) == (6, sum(len(result["tokens"]) for result in together))
    json.dumps([report.counts, report.figures, report.extra])


def test_stop_text_and_finish_reason(folder):
    [free] = results(folder, "The").extra["results"]
    assert (free["finish_reason"], len(free["tokens"])) == ("length", 12)
    stop = free["text"][3:5]
    [cut] = results(folder, "The", stop=["\0", stop]).extra["results"]
    assert cut["finish_reason"] == "stop"
    assert cut["text"] == free["text"].split(stop)[0]


def test_texts_keep_to_what_they_are_held_to(folder, tmp_path, capsys):
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"n": {"enum": [1, 2]}},
        "required": ["n"],
        "additionalProperties": False,
    }
    (tmp_path / "s.json").write_text(json.dumps(schema), encoding="utf-8")
    (tmp_path / "g.lark").write_text('start: "a" | "春"', encoding="utf-8")
    for given, fits in (
        ({"json_schema": json.dumps(schema)}, lambda text: json.loads(text)["n"] in (1, 2)),
        ({"json_schema": str(tmp_path / "s.json")}, lambda text: json.loads(text)["n"] in (1, 2)),
        ({"regex": "[0-9]{3}"}, lambda text: len(text) == 3 and text.isdecimal()),
        ({"choice": ["yes", "no"]}, lambda text: text in ("yes", "no")),
        ({"grammar": tmp_path / "g.lark"}, lambda text: text in ("a", "春")),
    ):
        found = results(folder, "The", "day", max_new_tokens=30, temperature=1.0, **given).extra["results"]
        assert all(fits(row["text"]) and row["finish_reason"] == "stop" for row in found), given
    [cut] = results(folder, "The", regex="[0-9]{40}", max_new_tokens=3).extra["results"]
    assert "needs more tokens" in cut["incomplete"] and cut["finish_reason"] == "length"
    app.run(GenerateSettings(model=folder, prompt=["The"], regex="[0-9]{40}", max_new_tokens=3, device="cpu"))
    assert "ended by length; the text ends before" in capsys.readouterr().err


def test_guesses_change_no_result(folder, tmp_path, make):
    prompts, asked = ["The quick brown fox. The quick brown fox.", "day"], {"max_new_tokens": 40}
    plain, looked = (results(folder, *prompts, lookup=lookup, **asked) for lookup in (0, 4))
    drafted = results(folder, *prompts, draft=folder, **asked)  # its own draft: every guess is right
    assert plain.extra == looked.extra == drafted.extra and plain.counts["guessed"] == 0
    assert drafted.counts["guessed_right"] == drafted.counts["guessed"] > 40
    alone, quick = (results(folder, prompts[0], lookup=lookup, **asked) for lookup in (0, None))
    assert (
        alone.extra == quick.extra
        and quick.counts["guessed"] > 0 == results(folder, *prompts).counts["guessed"]
    )
    model, _ = folders.load(folder)
    other = Tokenizer.train(["Other texts have other tokens."] * 3, vocab_size=300)
    folders.save(model, other, tmp_path / "other")
    recurrent = LSTM(LSTMConfig(vocab=300, length=64, dim=32, hidden=32))
    folders.save(recurrent, other, tmp_path / "lstm")
    with pytest.raises(UsageError, match="leave --lookup out"):
        results(str(tmp_path / "lstm"), "a", lookup=4)
    assert results(str(tmp_path / "lstm"), "a").counts["tokens"] == 12
    with pytest.raises(ModelError, match="has other tokens than"):
        results(folder, "a", draft=str(tmp_path / "other"))


def test_prompts_from_a_file(folder, tmp_path):
    lines, rows = tmp_path / "p.txt", tmp_path / "p.jsonl"
    lines.write_bytes("one\r\n\n שלום \n".encode())
    rows.write_text('{"prompt": "a\\nb"}\n\n{"text": "c", "label": 1}\n', encoding="utf-8")
    read = lambda path: app.read_prompts(GenerateSettings(model=folder, prompt=["first"], file=path))  # noqa: E731
    assert read(lines) == ["first", "one", " שלום "]
    assert read(rows) == ["first", "a\nb", "c"]
    for line, message in (
        ("{", "line 2 is not JSON"),
        ('{"label": 1}', 'line 2 has no text in "prompt"'),
        ("[]", "line 2"),
    ):
        rows.write_text(f'{{"text": "x"}}\n{line}\n', encoding="utf-8")
        with pytest.raises(DataError, match=message):
            read(rows)
    lines.write_bytes(b"ok\n\xff\n")
    with pytest.raises(DataError, match=r"not UTF-8 \(byte 3\)"):
        read(lines)


def test_chat_renders_one_user_turn(chat_folder, monkeypatch):
    seen = []
    whole = app.written

    def written(engine, ids, *more):
        seen.extend(ids)
        return whole(engine, ids, *more)

    monkeypatch.setattr(app, "written", written)
    results(chat_folder, "Hi <|im_end|>", chat=True, system="Be brief.")
    tokenizer = Tokenizer.load(chat_folder)
    start, end = tokenizer.vocab["<|im_start|>"], tokenizer.vocab["<|im_end|>"]
    [ids] = seen
    assert (ids.count(start), ids.count(end)) == (3, 2)  # the one in the prompt's text is text
    assert tokenizer.decode(ids) == "system\nBe brief.\nuser\nHi <|im_end|>\nassistant\n"


def test_chats_from_a_file_are_rendered_as_they_are(chat_folder, tmp_path):
    tokenizer, rows = Tokenizer.load(chat_folder), tmp_path / "p.jsonl"
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "春"},
        {"role": "user", "content": "And?"},
    ]
    rows.write_text(json.dumps({"messages": chat}) + '\n{"text": "The"}\n', encoding="utf-8")
    report = results(chat_folder, file=rows)
    [first, second] = report.extra["results"]
    assert (first["prompt"], second["prompt"]) == (chat, "The")
    assert report.counts["prompt_tokens"] == len(chat_ids(tokenizer, chat)) + 2 and "> And?\n" in report.text
    with pytest.raises(UsageError, match="line 1 is a chat as it stands"):
        results(chat_folder, file=rows, chat=True, system="No.")
    for row, message in (
        ({"messages": chat[:3]}, "line 1: its last turn is assistant"),
        ({"messages": []}, "line 1: its last turn is none"),
        ({"messages": {"role": "user"}}, "messages and tools are lists"),
        ({"messages": [{"content": "a"}, chat[1]]}, "line 1: message 0 has no role"),
    ):
        rows.write_text(json.dumps(row), encoding="utf-8")
        with pytest.raises(DataError, match=message):
            results(chat_folder, file=rows)


def test_an_adapter_changes_what_is_written(folder, tmp_path):
    model, _ = folders.load(folder)
    adapt(model, LoRASettings(lora_r=2), 0)
    with torch.no_grad():
        for _, layer in adapters(model):
            layer.b.normal_(generator=torch.Generator().manual_seed(1))
    write_adapter(model, tmp_path, folder)
    put = results(folder, "The", adapter=tmp_path).extra["results"]
    assert put == results(str(tmp_path), "The").extra["results"]
    assert put != results(folder, "The").extra["results"]
    with pytest.raises(ModelError, match=r"holds no adapter_config\.json: --adapter takes"):
        results(folder, "The", adapter=folder)


def test_errors_say_what_to_do(folder, tmp_path):
    with pytest.raises(UsageError, match="is no file"):
        results(folder, file=tmp_path / "none.txt")
    with pytest.raises(UsageError, match="no prompt"):
        results(folder)
    with pytest.raises(ModelError, match="no chat template.*leave --chat out"):
        results(folder, "a", chat=True)
    with pytest.raises(UsageError, match="add --chat"):
        results(folder, "a", system="b")
    with pytest.raises(UsageError, match="--json-schema and --regex exclude each other"):
        results(folder, "a", json_schema="{}", regex="a")
    with pytest.raises(UsageError, match=r"--json-schema: .*none\.json cannot be read: No such file"):
        results(folder, "a", json_schema=str(tmp_path / "none.json"))
    with pytest.raises(ModelError, match=rf"prompt 2 has \d+ tokens .* {LENGTH} positions"):
        results(folder, "a", "春" * LENGTH)
    with pytest.raises(SettingsError, match="'gpu' is unknown"):
        results(folder, "a", device="gpu")
    model, _ = folders.load(folder)
    folders.save(model, None, tmp_path / "bare")
    with pytest.raises(ModelError, match="no tokenizer.json"):
        results(str(tmp_path / "bare"), "a")


def test_a_gap_is_asked_for_by_the_marks_of_the_models_that_know_gaps(folder):
    with pytest.raises(ModelError, match="pretrained with objective=infill"):
        results(folder, "The quick", suffix="fox")
    with pytest.raises(UsageError, match="leave --chat out"):
        results(folder, "The quick", suffix="fox", chat=True)
    for names in SPELT:
        tokenizer = Tokenizer.train(["The quick brown fox"] * 9, 300, specials=names)
        before, after = tokenizer.encode("The quick "), tokenizer.encode(f" fox {names[0]}")
        prefix, suffix, middle = (tokenizer.vocab[name] for name in names)
        asked = gap_ids(tokenizer, "The quick ", f" fox {names[0]}")
        assert asked == [tokenizer.start_id, prefix, *before, suffix, *after, middle]
        asked = gap_ids(tokenizer, "The quick ", f" fox {names[0]}", "spm")
        assert asked == [tokenizer.start_id, prefix, suffix, *after, middle, *before]
        assert prefix not in after
