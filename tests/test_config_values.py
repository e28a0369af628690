"""What the values of a configuration may be: a wrong one is named with what was expected."""

import re
from pathlib import Path

import pytest

from cachequant.config import (
    load_config,
)
from cachequant.config_values import parse_bits
from cachequant.errors import UserError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.yaml"
    path.write_text("model: {path: somewhere}\nsampler: {steps: 50}\ncache: {interval: 5}\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("schedule.kind=dsp", "uniform, power, dps"),
        ("schedule.cost=l3", "l1, l2, quantised"),
        ("correction.layers=some", "none, consumers, all"),
        ("correction.trajectory=free", "full_precision, free_running"),
        ("quant.weight_search=max", "minmax, mse, percentile"),
        ("quant.activation_search=max", "minmax, mse, percentile"),
        ("sampler.steps=0", "1 to 100000"),
        ("sampler.eta=-0.1", "0 to 1"),
        ("sampler.eta=nan", "0 to 1"),
        ("cache.interval=0", "1 to 100000"),
        ("cache.interval=51", "sampler.steps is 50"),
        ("cache.branch=-1", "0 to 1000"),
        ("quant.weight_bits=9", "2 to 8"),
        ("quant.weight_bits=1", "2 to 8"),
        ("quant.activation_bits=16", "2 to 8"),
        ("quant.ends_bits=0", "2 to 8"),
        ("quant.attention_bits=9", "2 to 8"),
        ("correction.ridge=-1", "0 to 1e"),
        ("calibration.samples=0", "1 to 1e"),
        ("calibration.seed=-1", "0 to"),
        ("sample.count=0", "1 to 1e"),
        ("sample.batch_size=0", "1 to 1e"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_key_and_what_was_expected(
    model: Path, override: str, expected: str
) -> None:
    with pytest.raises(UserError) as caught:
        load_config(model, [override])
    assert override.split("=")[0] in str(caught.value) and expected in str(caught.value)


@pytest.mark.parametrize("name", ["../escape", "/etc", "a/b", "..", ".", "a/"])
def test_a_models_name_is_a_folder_of_the_output_and_nowhere_else(model: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"model\.name is .* expected the name of a folder in runs"):
        load_config(model, [f"model.name={name}"])


@pytest.mark.parametrize(
    ("key", "ends"),
    [
        ("cache.interval", (1, 50)),
        ("quant.weight_bits", (2, 8)),
        ("sampler.eta", (0, 1)),
        ("cache.branch", (0, 1000)),
        ("sampler.steps", (5, 100_000)),
    ],
)
def test_the_ends_of_a_range_belong_to_it(model: Path, key: str, ends: tuple[int, int]) -> None:
    for end in ends:
        section, name = key.split(".")
        assert getattr(getattr(load_config(model, [f"{key}={end}"]), section), name) == end


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("quant.bits_map={a: w9a8}", "quant.bits_map holds 'w9a8'"),
        ("quant.bits_map={a: int8}", "expected float or bits such as w8a8"),
        ("quant.weight_format=fp16", "quant.weight_format is 'fp16', expected one of int, fp8, log2"),
        ("quant.rounding=up", "expected one of nearest, compensated"),
        ("quant.budget=1.5", "quant.budget is 1.5, expected 0 to 1"),
        ("quant.recon.iterations=0", "quant.recon.iterations is 0"),
        ("quant.recon.iteration=5", "did you mean quant.recon.iterations"),
    ],
)
def test_what_quantisation_cannot_be(model: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        load_config(model, [override])


def test_settings_of_the_quantisation_that_exclude_one_another(model: Path) -> None:
    with pytest.raises(UserError, match="fp8 with 4 bits, expected 8"):
        load_config(model, ["quant.weight_format=fp8", "quant.weight_bits=4"])
    with pytest.raises(UserError, match=r"log2 with quant\.recon\.enabled"):
        load_config(model, ["quant.activation_format=log2", "quant.recon.enabled=true"])
    with pytest.raises(UserError, match=r"quant.budget is set with nearest rounding"):
        load_config(model, ["quant.budget=0.2", "quant.rounding=nearest"])


def test_bits_by_name_are_parsed() -> None:
    assert parse_bits("w4a8") == (4, 8) and parse_bits("float") is None
