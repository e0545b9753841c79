"""`langmill export`: what is written was read back and compared; what does not agree is not there afterwards."""

from __future__ import annotations

import gc
import json
import re
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

pytest.importorskip("gguf")

from langmill import cli
from langmill.adapt.lora import adapt
from langmill.common.errors import MissingExtra, ModelError, UsageError
from langmill.common.settings import ExportSettings, LoRASettings
from langmill.families import gguf_write, gguf_write_tokenizer, llama, modelfile
from langmill.families.folder import load, save
from langmill.families.gguf_file import read
from langmill.families.peft import load_adapter, merge, write_adapter
from langmill.jobs import export
from langmill.model.layers import Int4Linear, Int8Embedding
from langmill.model.replace import replace
from langmill.model.transformer import Transformer
from langmill.text.chat import chat_ids, render
from langmill.text.tokenizer import Tokenizer

LOOP = "{% for m in messages %}"
CHATML = (
    LOOP + "{{ '<|im_start|>' + m['role'] + '\n' }}{% generation %}{{ m['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    LOOP
    + "{% if loop.first %}{{ bos_token }}{% endif %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{{ m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
DEFAULTING = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    + CHATML
)
PLAIN = (
    LOOP
    + "{{ {'system': '', 'user': 'User: ', 'assistant': 'Bot: '}[m.role] + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Bot: {% endif %}"
)
COUNTING = LOOP + "{{ loop.index }}. {{ m.role }}: {{ m.content }}\n{% endfor %}"
NO_SYSTEM = (
    LOOP + "{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ m.content }}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([*export.TEXTS, "床前明月光 the river is long"] * 3, 420).with_template(CHATML)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A small chat model of random weights."""
    shape = {**llama.TINY["llama"], "hidden_size": 64, "intermediate_size": 96, "model_type": "llama"}
    model = Transformer(llama.config(shape | {"vocab_size": tokenizer.vocab_size + 5}))
    torch.manual_seed(0)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, 0.0 if weight.dim() > 1 else 1.0, 0.3)
    folder = tmp_path_factory.mktemp("export") / "model"
    save(model.eval(), tokenizer, folder, lineage={"made_by": "a test"})
    return folder


@torch.inference_mode()
def logits(where: Path, tokenizer: Tokenizer) -> torch.Tensor:
    found: torch.Tensor = load(where)[0](torch.tensor([tokenizer.prompt_ids(export.TEXTS[0])]))
    return found


def run(source: Path, out: Path, **more: Any) -> Any:
    return export.run(ExportSettings(model=str(source), out=out, **more), quiet=True)


@pytest.mark.parametrize(("kind", "head"), [("Q4_1", "Q8_0"), ("Q4_0", "Q8_0")])
def test_a_rounded_file_goes_out_as_it_came(source: Path, kind: str, head: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    run(source, first, type=kind, head_type=head)
    run(first, second)
    files = read(first), read(second)
    for name in files[0].tensors:
        assert torch.equal(*(torch.from_numpy(file.dequantize(name)) for file in files)), name
        if "ffn" in name and "norm" not in name:
            assert [file.type_name(name) for file in files] == [kind, kind]
    run(first, tmp_path / "other.gguf", type="Q8_0")
    assert read(tmp_path / "other.gguf").type_name("blk.0.ffn_up.weight") == "Q8_0"


def test_a_file_and_its_modelfile(
    source: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "tiny.gguf"
    assert cli.run(["export", str(source), "--out", str(out), "--type", "q8_0", "--json", "--quiet"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (
        told["ok"]
        and told["counts"]["Q8_0"] == 15
        and told["counts"]["texts_checked"] == len(export.TEXTS) + 1
    )
    assert told["figures"]["divergence"] < 0.01 and "begin without bos" in told["notes"][0]
    again = load(out)[1]
    assert again is not None and again.chat_template == CHATML
    chat = [{"role": "user", "content": "床前 <|im_end|>"}]
    assert chat_ids(again, chat) == chat_ids(tokenizer, chat)
    assert sorted(file.name for file in out.parent.iterdir()) == ["tiny.Modelfile", "tiny.gguf"]
    words = out.with_suffix(".Modelfile").read_text("utf-8")
    assert "FROM ./tiny.gguf\n" in words and 'PARAMETER stop "<|im_end|>"\n' in words
    assert 'PARAMETER stop "<|endoftext|>"\n' in words and words.endswith("PARAMETER num_ctx 64\n")


def test_without_a_type_the_narrowest_that_holds_the_weights(
    source: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model, _ = load(source, dtype=torch.bfloat16)
    model.decoder.blocks[0].mlp.up.weight.data[0, 0] = 1e-20  # float16 has none so small
    save(model, tokenizer, tmp_path / "bf16")
    assert run(tmp_path / "bf16", tmp_path / "a.gguf").counts["BF16"] == 15
    assert torch.equal(logits(tmp_path / "a.gguf", tokenizer), logits(tmp_path / "bf16", tokenizer))
    assert run(source, tmp_path / "b.gguf").counts["F16"] == 15
    assert run(source, tmp_path / "c.gguf", type="Q4_0", head_type="BF16").counts == {
        "tensors": 20, "Q4_0": 14, "BF16": 1, "F32": 5, "texts_checked": 9,
        "bytes": (tmp_path / "c.gguf").stat().st_size,
    }  # fmt: skip


def test_rounded_models_keep_their_codes(source: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model, _ = load(source)
    replace(
        model,
        lambda name, layer: isinstance(layer, torch.nn.Linear),
        lambda name, layer: Int4Linear.of(layer),
    )  # type: ignore[arg-type]

    def embedding(name: str, layer: Any) -> Any:
        made = Int8Embedding(*layer.weight.shape)
        made.steps = (layer.weight.detach().abs().amax(1) / 127).half().float()
        made.codes = (layer.weight.detach() / made.steps[:, None]).round().clamp(-127, 127).to(torch.int8)
        return made

    replace(model, lambda name, layer: name == "tokens", embedding)
    weight = model.decoder.blocks[0].mlp.up.weight.clone()  # type: ignore[union-attr]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_load", lambda settings: (model, tokenizer))
        report = run(source, tmp_path / "x.gguf")
    assert (report.counts["Q4_1"], report.counts["Q8_0"], report.counts["F32"]) == (14, 1, 5)
    file = read(tmp_path / "x.gguf")
    assert torch.equal(torch.from_numpy(file.dequantize("blk.0.ffn_up.weight")), weight)
    assert report.figures == {} and len(report.extra["notes"]) == 1


def test_plain_folders_of_files_and_adapters(source: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    run(source, tmp_path / "x.gguf", type="Q8_0")
    report = run(tmp_path / "x.gguf", tmp_path / "plain", to="hf", type="BF16")
    assert "bfloat16" in report.text
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert theirs.dtype == torch.bfloat16
    assert (logits(tmp_path / "plain", tokenizer) - logits(tmp_path / "x.gguf", tokenizer)).abs().max() < 2.0
    model, _ = load(source)
    adapt(model, LoRASettings(lora_r=2), 0)
    for name, weight in model.named_parameters():
        if name.endswith(".b"):
            torch.nn.init.normal_(weight, 0.0, 0.1)
    (tmp_path / "adapter").mkdir()
    write_adapter(model, tmp_path / "adapter", str(source))
    run(tmp_path / "adapter", tmp_path / "merged", to="hf")
    run(tmp_path / "adapter", tmp_path / "merged.gguf", type="F32", base=str(source))
    plain, _ = load(source)
    load_adapter(plain, tmp_path / "adapter")
    merge(plain)
    rows = torch.tensor([tokenizer.prompt_ids(export.TEXTS[1])])
    for where in ("merged", "merged.gguf"):
        with torch.inference_mode():
            assert (load(tmp_path / where)[0](rows) - plain(rows)).abs().max() < 1e-4
    with pytest.raises(UsageError, match="is no adapter"):
        run(source, tmp_path / "y.gguf", base=str(source))


def test_one_model_is_in_memory_at_a_time(source: Path, tmp_path: Path) -> None:
    made, alive, given = export._load, [], export.load_gguf

    def loaded(settings: ExportSettings) -> Any:
        model, tokenizer = made(settings)
        alive.append(weakref.ref(model))
        return model, tokenizer

    def read_back(path: Path) -> Any:
        gc.collect()
        assert alive[0]() is None
        return given(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_load", loaded)
        patch.setattr(export, "load_gguf", read_back)
        run(source, tmp_path / "x.gguf")
    assert alive


def test_the_package_that_is_missing_is_named(source: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "gguf.constants", None)
        with pytest.raises(MissingExtra, match=r"langmill\[gguf\]"):
            run(source, tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_overwritten(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    run(source, out, type="F32")
    before = out.read_bytes()
    with pytest.raises(UsageError, match=r"x\.gguf exists already"):
        run(source, out)
    with pytest.raises(UsageError, match="which this reads"):
        run(out, out, force=True)
    assert out.read_bytes() == before
    run(source, out, type="Q8_0", force=True)
    assert out.stat().st_size < len(before)
    with pytest.raises(UsageError, match=r"ends in \.gguf"):
        run(source, tmp_path / "x.bin")
    with pytest.raises(UsageError, match="writes plain weights"):
        run(source, tmp_path / "folder", to="hf", type="Q8_0")
    with pytest.raises(UsageError, match="exists already"):
        run(out, source, to="hf")


def wrong_rows(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(gguf_write, "paired", lambda rows, heads: rows)


def wrong_cuts(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(gguf_write_tokenizer, "_pre_name", lambda cuts, whole, form: ("bloom", "none"))


def wrong_template(patch: pytest.MonkeyPatch) -> None:
    made = gguf_write.entries
    lost = {"tokenizer.chat_template": "{{ messages }}"}
    patch.setattr(gguf_write, "entries", lambda tokenizer, rows: made(tokenizer, rows) | lost)


def wrong_bytes(patch: pytest.MonkeyPatch) -> None:
    made = gguf_write.content

    def changed(model: Any, piece: Any, settle: bool) -> Any:
        rows = made(model, piece, settle)
        return rows ^ 1 if piece.name == "blk.1.ffn_up.weight" else rows

    patch.setattr(gguf_write, "content", changed)


@pytest.mark.parametrize(
    ("break_", "words"),
    [
        (wrong_rows, "its logits are"),
        (wrong_cuts, "has other ids when read back"),
        (wrong_template, "the chat template or what ends a text is lost"),
        (wrong_bytes, r"tensor blk\.1\.ffn_up\.weight does not read back"),
    ],
)
@pytest.mark.parametrize("there", [False, True])
def test_what_does_not_read_back_is_not_kept(
    source: Path, tmp_path: Path, there: bool, break_: Callable[[pytest.MonkeyPatch], None], words: str
) -> None:
    out = tmp_path / "x.gguf"
    if there:
        run(source, out, type="F16")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.MonkeyPatch.context() as patch:
        break_(patch)
        with pytest.raises(ModelError, match=words):
            run(source, out, type="Q8_0", force=there)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_plain_folder_that_does_not_read_back_is_not_kept(source: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_same_ids", lambda *given: (_ for _ in ()).throw(ModelError("other ids")))
        with pytest.raises(ModelError, match="other ids"):
            run(source, tmp_path / "folder", to="hf")
    assert list(tmp_path.iterdir()) == []


def go(template: str, messages: Sequence[dict[str, str]]) -> str:
    """What Ollama makes of the templates that are written for it: a loop of branches over the roles."""
    found = re.fullmatch(
        r"(.*?)\{\{ range \.Messages \}\}(.*)\{\{ end \}\}\{\{ end \}\}(.*)", template, re.DOTALL
    )
    assert found is not None
    branches = re.findall(
        r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}(.*?)\{\{ \.Content \}\}(.*?)(?=\{\{ else|\Z)',
        found[2],
        re.DOTALL,
    )
    around = {role: (before, after) for role, before, after in branches}
    return (
        found[1]
        + "".join(around[m["role"]][0] + m["content"] + around[m["role"]][1] for m in messages)
        + found[3]
    )


@pytest.mark.parametrize("bos_added", [False, True])
@pytest.mark.parametrize("template", [CHATML, LLAMA3, DEFAULTING, PLAIN])
def test_modelfiles_write_chats_as_the_template_does(
    tokenizer: Tokenizer, template: str, bos_added: bool
) -> None:
    words = modelfile.modelfile("x.gguf", tokenizer.with_template(template), 64, bos_added)
    found = re.search(r'TEMPLATE """(.*?)"""', words, re.DOTALL)
    assert found is not None
    system = re.search(r'SYSTEM """(.*?)"""', words, re.DOTALL)
    assert (system is not None) == (template == DEFAULTING)
    chat = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That.\nAnd\n\nthis."},
            {"role": "user", "content": "你好 {{ x }}"}]  # fmt: skip
    for messages in (chat, [{"role": "system", "content": "Be brief."}, *chat], chat[:1]):
        asked = messages
        if system and messages[0]["role"] != "system":
            asked = [{"role": "system", "content": system[1]}, *messages]
        bos = "<|endoftext|>"
        expected = render(template, messages, add_generation_prompt=True, bos_token=bos)
        assert go(found[1], asked) == (expected.removeprefix(bos) if bos_added else expected)


@pytest.mark.parametrize(
    "template", [COUNTING, NO_SYSTEM, "{{ messages[0].content }}", "{{ broken", "{{ {} }}"]
)
def test_modelfiles_point_to_the_file_for_other_templates(tokenizer: Tokenizer, template: str) -> None:
    words = modelfile.modelfile("x.gguf", tokenizer.with_template(template), 64, False)
    assert "TEMPLATE" not in words and "has no simple counterpart in Go" in words
    assert 'TEMPLATE """{{ .Prompt }}"""' in modelfile.modelfile("x.gguf", None, 64, False)
