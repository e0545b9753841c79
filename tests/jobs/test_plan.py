import json
from pathlib import Path

import pytest

from langmill.common.configure import configure
from langmill.common.errors import SettingsError, UsageError
from langmill.common.settings import ModelSettings, PlanSettings
from langmill.families.folder import save
from langmill.jobs import plan, probe
from langmill.jobs.size import config_for
from langmill.model.config import ModelConfig
from langmill.model.count import parameters
from langmill.text.tokenizer import Tokenizer

TINY = ("size=200k", "max_length=32", "micro_batch_size=2", "dtype=float32", "compile=false", "threads=1")


def settings(*more: str, **named: object) -> PlanSettings:
    return configure(PlanSettings, None, more, **named)


def test_closed_forms_without_a_measurement() -> None:
    report = plan.run(settings("size=small", "vocab_size=8192", tokens=10**8, probe=False), quiet=True)
    assert report.counts["parameters"] == 13_767_552 and report.counts["tokens"] == 10**8
    assert report.figures["weights_bytes"] == 4 * 13_767_552 == report.figures["gradients_bytes"]
    assert report.figures["total_flops"] > 6 * 13_767_552 * 10**8
    assert (
        "seconds" not in report.figures
        and "--from MODEL" not in plan.run(settings("size=tiny", tokens=10**9, probe=False), quiet=True).text
    )


def test_a_plan_of_real_text_measures_it_and_a_step(texts: Path) -> None:
    report = plan.run(settings(*TINY, path=[str(texts)]), quiet=True)
    f = report.figures
    assert 0 < f["step_seconds"] < f["seconds"] and f["peak_bytes"] > f["weights_bytes"]
    # 60 documents a fiftieth of which is held out, at least a token for four bytes and at most one for each
    assert 3000 < report.counts["tokens"] < 60 * 1200
    assert "--from MODEL" in report.text and json.loads(json.dumps(report.extra)) == report.extra


def test_deep_models_are_extended_from_one_and_two_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def apart(config: ModelConfig, *rest: object) -> probe.Cost:
        tried.append(config.decoder.layers)
        n = config.decoder.layers
        return probe.Cost(1.0 + n, 64.0, 1000 + 10 * n, 900, "float32", False, 1, 1e11, 1.0, ())

    monkeypatch.setattr(plan, "apart", apart)
    monkeypatch.setattr(plan, "LARGEST_STEP", 0.0)
    config, train = plan.resolve(plan.PlanSettings().model, plan.PlanSettings().train, 1000)
    assert isinstance(config, ModelConfig)
    train = train.model_copy(update={"gradient_accumulation_steps": 3})
    cost = plan.calibrate(config, train, None, 10, 0, plan.find_device("cpu"))
    layers = config.decoder.layers
    assert tried == [1, 2] and cost.step_seconds == pytest.approx(3 * (1 + layers))
    assert cost.peak_bytes == 1000 + 10 * layers and cost.step_tokens == 192


def test_a_budget_gives_the_size_that_it_pays_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "matmul_flops", lambda *a: 2e11)  # half of it is assumed
    sizes = [
        plan.run(settings(budget=time, probe=False), quiet=True).counts["parameters"]
        for time in ("1h", "4h", "4d")
    ]
    hour = 1e11 * 3600
    assert 6 * sizes[0] * 20 * sizes[0] == pytest.approx(
        hour, rel=0.35
    )  # attention and rounding are the rest
    assert sizes[0] * 1.5 < sizes[1] < sizes[2] / 3
    with pytest.raises(UsageError, match="budget"):
        plan.run(settings("size=small", budget="1h", probe=False), quiet=True)


@pytest.mark.parametrize(
    ("words", "seconds"), [("90s", 90), ("1.5h", 5400), (" 2 d ", 172_800), ("30m", 1800)]
)
def test_durations(words: str, seconds: float) -> None:
    assert plan.duration(words) == seconds
    for wrong in ("", "0s", "h", "1 week", "-1h"):
        with pytest.raises(SettingsError, match="90s"):
            plan.duration(wrong)


def test_an_lstm_can_be_planned_too() -> None:
    report = plan.run(settings("family=lstm", "size=1M", tokens=1000, probe=False), quiet=True)
    assert report.extra["shape"]["layers"] == 2 and report.counts["parameters"] == pytest.approx(
        1e6, rel=0.01
    )


def test_going_on_brings_shape_and_tokenizer_and_reads_no_weight(texts: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["the history of water is known"] * 9, 300)
    shape = config_for(ModelSettings(size="200k"), tokenizer.vocab_size, 64)
    save(probe.fresh(shape, 0), tokenizer, tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    given = settings(*TINY[1:], path=[str(texts)], from_model=str(tmp_path / "model"))
    report = plan.run(given, quiet=True)
    assert report.counts["parameters"] == parameters(shape) and report.figures["seconds"] > 0
    assert report.counts["tokens"] > 3 * 1200  # counted by a tokenizer that knows none of these words
    anew = plan.run(settings(*TINY, probe=False), quiet=True)
    assert report.extra["train"]["learning_rate"] < anew.extra["train"]["learning_rate"]
    with pytest.raises(UsageError, match="leave model.size out"):
        plan.run(settings(TINY[0], from_model=str(tmp_path / "model")), quiet=True)
    with pytest.raises(UsageError, match="leave --from"):
        plan.run(settings(budget="1h", from_model=str(tmp_path / "model")), quiet=True)
