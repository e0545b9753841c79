from functools import cache
from itertools import pairwise

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from langmill.common.errors import ModelError, SettingsError, UsageError
from langmill.families.folder import load_model
from langmill.infer.generate import _seen, generate, generate_ids, generate_pieces
from langmill.infer.request import Request
from langmill.infer.running import engine_for
from langmill.infer.sampling import Sampling
from langmill.infer.text import Clip
from langmill.model.config import Head, LSTMConfig, ModelConfig, StackConfig, Tokens
from langmill.model.init import init_
from langmill.model.recurrent import LSTM
from langmill.model.transformer import Transformer
from langmill.text.tokenizer import Tokenizer

VOCAB, LENGTH = 300, 48
PROMPTS = [[5, 6, 7, 8, 9], [11], [40, 41, 42, 43, 44, 45, 46, 47, 48], [2, 3], [5, 6, 7, 8, 9]]


@pytest.fixture(scope="module")
def tokenizer():
    text = ["The quick brown fox jumps over the lazy dog. 春眠不觉晓，处处闻啼鸟。 שלום 🦊"] * 3
    return Tokenizer.train(text, vocab_size=VOCAB, kind="bpe")


@cache
def ours(kind="llama"):
    if kind == "lstm":
        model = LSTM(LSTMConfig(vocab=VOCAB, length=LENGTH, dim=24, hidden=24))
    else:
        stack = StackConfig(dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, hidden=48)
        model = Transformer(ModelConfig(stack, Tokens(VOCAB, LENGTH), head=Head(VOCAB)))
    init_(model, 0)
    with torch.no_grad():  # a wide spread, so that no two scores are nearly equal
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    return model.eval()


def ids_of(model, prompts, stop_ids=frozenset(), **sampling):
    """Ids and finish reasons of every prompt."""
    ids, reasons = [[] for _ in prompts], [None] * len(prompts)
    for step in generate_ids(model, prompts, Sampling(**sampling), stop_ids):
        for token in step:
            assert reasons[token.row] is None
            ids[token.row].append(token.id)
            reasons[token.row] = token.finish
    return ids, reasons


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "gpt2"])
def test_greedy_equals_transformers(tmp_path, kind):
    sizes = {
        "vocab_size": 97,
        "initializer_range": 0.3,
        "eos_token_id": 5,
        "bos_token_id": 1,
        "pad_token_id": 0,
    }
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **sizes)
    else:
        config = transformers.AutoConfig.for_model(
            kind, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, **sizes,
        )  # fmt: skip
        if kind == "mistral":
            config.sliding_window = 6
    torch.manual_seed(1)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    prompts = [[7, 8, 9], [20], [30, 31, 32, 33, 34, 35, 36, 37], [50, 51]]
    for penalty in (1.0, 1.3):
        ids, reasons = ids_of(model, prompts, frozenset({5}), max_new_tokens=30, repetition_penalty=penalty)
        for prompt, found, reason in zip(prompts, ids, reasons, strict=True):
            expected = theirs.generate(
                torch.tensor([prompt]), max_new_tokens=30, do_sample=False, repetition_penalty=penalty
            )
            assert found == expected[0, len(prompt) :].tolist()
            assert reason == ("stop" if found[-1] == 5 else "length")
        engine = engine_for(
            model, None, slots=2, length=64
        )  # by the C++ pass, fewer at once than there are prompts
        how = Sampling(max_new_tokens=30, repetition_penalty=penalty)
        rows = {engine.submit(Request(prompt, how, stop_ids=frozenset({5}))): [] for prompt in prompts}
        while not engine.idle:
            for event in engine.step():
                rows[event.request] += event.ids
        assert list(rows.values()) == ids


@pytest.mark.parametrize("kind", ["llama", "lstm"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "top_p": 0.95}, {"frequency_penalty": 1.5}])
def test_a_batch_of_unequal_prompts_equals_one_by_one(kind, sampling):
    free, _ = ids_of(ours(kind), PROMPTS, max_new_tokens=20, **sampling)
    stops = frozenset({free[0][3], free[2][7]})  # so that rows leave the batch at different steps
    together = ids_of(ours(kind), PROMPTS, stops, max_new_tokens=20, **sampling)
    for row, prompt in enumerate(PROMPTS[:4]):
        alone = ids_of(ours(kind), [prompt], stops, max_new_tokens=20, **sampling)
        assert (together[0][row], together[1][row]) == (alone[0][0], alone[1][0])
    assert len(set(map(len, together[0]))) > 1
    equal_prompts = together[0][0] == together[0][4]
    assert equal_prompts == ("temperature" not in sampling)


def test_the_seed_decides():
    once, again, other = (
        ids_of(ours(), PROMPTS, max_new_tokens=12, temperature=1.5, seed=seed)[0] for seed in (3, 3, 4)
    )
    assert once == again != other


def test_the_last_position_ends_a_row_and_a_longer_prompt_is_refused():
    prompts = [[7] * LENGTH, [7] * (LENGTH - 4), [7]]
    ids, reasons = ids_of(ours(), prompts, max_new_tokens=10)
    assert [len(row) for row in ids] == [1, 5, 10]
    assert reasons == ["length"] * 3
    with pytest.raises(ModelError, match=f"prompt 2 has {LENGTH + 1} tokens .* {LENGTH} positions"):
        ids_of(ours(), [[1], [7] * (LENGTH + 1)])
    assert len(ids_of(ours("lstm"), [[7] * (LENGTH + 1)], max_new_tokens=9)[0][0]) == 9  # no last position


def test_prompts_that_cannot_be_gone_on_from():
    with pytest.raises(ModelError, match="prompt 1 has no tokens"):
        ids_of(ours(), [[]])
    with pytest.raises(ModelError, match=f"{VOCAB + 1} and the model knows {VOCAB} tokens"):
        ids_of(ours(), [[1], [VOCAB + 1]])
    assert list(generate_ids(ours(), [], Sampling())) == []


def test_padding_is_not_a_token_that_was_seen():
    seen = _seen(torch.tensor([[5, 6, 5], [7, 0, 0]]), torch.tensor([3, 1]), 9)
    assert seen.nonzero().tolist() == [[0, 5], [0, 6], [1, 7]]


@settings(max_examples=200, deadline=None)
@given(
    st.text("abc", max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 30), max_size=6),
)
def test_clip_is_the_text_before_the_first_complete_stop_text(text, stops, cuts):
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(ends)[1]] if ends else text
    clip, shown = Clip(stops), ""
    borders = [0, *sorted(cuts), len(text)]
    for start, end in pairwise(borders):
        shown += clip.push(text[start:end])
        assert expected.startswith(shown)
        if clip.stopped:
            break
    assert clip.stopped == bool(ends)
    assert shown + clip.flush() == expected


def test_clip_holds_back_no_more_than_it_must():
    clip = Clip(["\nUser:"])
    assert [clip.push(piece) for piece in ("Hi", "!\nUs", "e", "ful\n")] == ["Hi", "!", "", "\nUseful"]


def texts_of(tokenizer, prompts, **sampling):
    texts, last = [""] * len(prompts), [None] * len(prompts)
    for step in generate_pieces(ours(), tokenizer, prompts, Sampling(**sampling)):
        for piece in step:
            texts[piece.row] += piece.text
            last[piece.row] = piece
    return texts, last


def test_text_is_the_decoded_ids_and_ends_before_a_stop_text(tokenizer):
    prompts = PROMPTS[:4]
    ids, _ = ids_of(ours(), prompts, tokenizer.stop_ids, max_new_tokens=30, temperature=1.0)
    full, _ = texts_of(tokenizer, prompts, max_new_tokens=30, temperature=1.0)
    assert full == [tokenizer.decode(row) for row in ids]
    stop = full[2][4:7]
    cut, last = texts_of(tokenizer, prompts, max_new_tokens=30, temperature=1.0, stop=(stop,))
    assert cut == [text.split(stop)[0] for text in full]
    assert last[2].finish == "stop"


def test_streamed_text_never_splits_a_character(tokenizer):
    """A random model writes bytes in any order; what it streams is what decoding all of it gives."""
    pieces = list(generate(ours(), tokenizer, "春", max_new_tokens=40, temperature=3.0, seed=5))
    [ids], _ = ids_of(
        ours(), [tokenizer.prompt_ids("春")], tokenizer.stop_ids, max_new_tokens=40, temperature=3.0, seed=5
    )
    assert "".join(pieces) == tokenizer.decode(ids)
    assert all(pieces)


def test_generate_checks_its_arguments_at_once(tokenizer):
    with pytest.raises(SettingsError, match="'temperture': did you mean 'temperature'"):
        generate(ours(), tokenizer, "a", temperture=1)
    with pytest.raises(ModelError, match="positions"):
        generate(ours(), tokenizer, [1] * (LENGTH + 1))
    with pytest.raises(UsageError, match="without a tokenizer"):
        generate(ours(), None, "a")


def test_an_empty_prompt_starts_from_the_start_token(tokenizer):
    assert tokenizer.prompt_ids("") == [tokenizer.start_id]
    assert isinstance("".join(generate(ours(), tokenizer, "", max_new_tokens=4)), str)
