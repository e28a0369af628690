"""The configuration: what is shipped loads, what is wrong is named, and later layers win."""

import json
from dataclasses import MISSING, asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachequant.config import (
    RunConfig,
    apply_overrides,
    config_from_dict,
    config_to_dict,
    load_config,
    method_path,
    repository_folder,
)
from cachequant.config_values import validate
from cachequant.errors import UserError

CONFIGS = repository_folder() / "configs"
MODELS = sorted(p for p in CONFIGS.glob("*.yaml") if not p.name.startswith("_"))
METHODS = sorted(p.stem for p in (CONFIGS / "method").glob("*.yaml"))


def write(folder: Path, text: str, name: str = "model.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write(tmp_path, "model: {path: somewhere}\nsampler: {steps: 50}\ncache: {interval: 5}\n")


# What is shipped


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
@pytest.mark.parametrize("method", METHODS)
def test_every_shipped_model_loads_with_every_shipped_method(path: Path, method: str) -> None:
    config = load_config(path, [f"method={method}"])
    assert config.method == method
    assert config.model.path and config.cache.interval <= config.sampler.steps


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
def test_every_shipped_model_names_its_method_by_default(path: Path) -> None:
    assert load_config(path).method in METHODS


def test_the_defaults_are_valid() -> None:
    config = RunConfig()
    validate(config)
    assert config_from_dict(config_to_dict(config)) == config


# Precedence


def test_later_layers_win(tmp_path: Path) -> None:
    method = write(tmp_path, "quant: {weight_bits: 4, activation_bits: 4, ends_bits: null}\n", "method.yaml")
    text = f"method: {method}\nquant: {{activation_bits: 6}}\n"
    path = write(tmp_path, text)
    config = load_config(path)
    assert config.quant.weight_bits == 4  # method over the schema
    assert config.quant.activation_bits == 6  # model over method
    assert config.quant.ends_bits is None and config.quant.attention_bits == 8  # schema where nobody speaks
    assert config.calibration.seed == 1243  # base
    config = load_config(path, ["quant.activation_bits=3", "quant.weight_bits=5", "calibration.seed=7"])
    assert (config.quant.activation_bits, config.quant.weight_bits, config.calibration.seed) == (3, 5, 7)


def test_a_method_may_override_the_base_and_not_the_model(tmp_path: Path) -> None:
    method = write(tmp_path, "calibration: {seed: 5}\nsampler: {steps: 20}\n", "method.yaml")
    path = write(tmp_path, f"method: {method}\nsampler: {{steps: 30}}\n")
    config = load_config(path)
    assert config.calibration.seed == 5 and config.sampler.steps == 30


def test_the_method_of_an_override_beats_that_of_the_model(tmp_path: Path) -> None:
    path = write(tmp_path, "method: naive\n")
    assert load_config(path).correction.cache is False
    config = load_config(path, ["method=paper"])
    assert config.method == "paper" and config.correction.cache is True


def test_what_a_model_sets_for_a_method_counts_with_that_method_only(tmp_path: Path) -> None:
    path = write(
        tmp_path, "cache: {branch: 3}\nmethods: {best: {cache: {branch: 0}, correction: {ridge: 0.5}}, naive: {}}\n"
    )
    own = load_config(path)
    assert own.method == "best" and own.cache.branch == 0 and own.correction.ridge == 0.5
    assert load_config(path, ["method=naive"]).cache.branch == load_config(path, ["method=paper"]).cache.branch == 3
    assert load_config(path, ["cache.branch=2"]).cache.branch == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("methods: best\n", "expected sections"),
        ("methods: {best: 3}\n", "methods.best is 3"),
        ("methods: {bst: {cache: {branch: 0}}}\n", "'bst'"),
        ("methods: {paper: {cache: {brnch: 0}}}\n", "did you mean cache.branch"),
        ("methods: ${nowhere}\n", "nowhere"),
        ("methods: {best: '${nowhere}'}\n", "nowhere"),
        ("methods: {3: {}}\n", "'3'"),
    ],
)
def test_a_section_of_methods_is_checked_whatever_the_method(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(write(tmp_path, text))


def test_the_last_of_two_equal_overrides_wins(model: Path) -> None:
    assert load_config(model, ["cache.interval=2", "cache.interval=3"]).cache.interval == 3


def test_an_empty_file_is_the_base(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, ""))
    assert config.method == "best" and config.output == "runs"


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("sampler.guidance_scale=7.5", "sampler", "guidance_scale", 7.5),
        ("sampler.guidance_scale=null", "sampler", "guidance_scale", None),
        ("sampler.labels=[1,2]", "sampler", "labels", [1, 2]),
        ("correction.cache=false", "correction", "cache", False),
        ("correction.ridge=1e-4", "correction", "ridge", 1e-4),
        ("sampler.eta=1", "sampler", "eta", 1.0),
        ("model.path=a=b", "model", "path", "a=b"),
        ("quant.ends_bits=null", "quant", "ends_bits", None),
    ],
)
def test_overrides_take_the_type_of_their_key(
    model: Path, override: str, section: str, key: str, value: object
) -> None:
    found = getattr(getattr(load_config(model, [override]), section), key)
    assert found == value and type(found) is type(value)


# Mistakes


@pytest.mark.parametrize(
    ("text", "unknown", "near"),
    [
        ("methd: best", "methd", "method"),
        ("cach: {interval: 5}", "cach", "cache"),
        ("cache: {intervall: 5}", "cache.intervall", "cache.interval"),
        ("quant: {weight_bit: 5}", "quant.weight_bit", "quant.weight_bits"),
        ("correction: {forcast: true}", "correction.forcast", "correction.forecast"),
    ],
)
def test_an_unknown_key_names_its_nearest_at_every_level(tmp_path: Path, text: str, unknown: str, near: str) -> None:
    with pytest.raises(UserError, match=f"unknown key {unknown}; did you mean {near}") as caught:
        load_config(write(tmp_path, text))
    assert "model.yaml" in str(caught.value)
    method = write(tmp_path, text, "own.yaml")
    with pytest.raises(UserError, match=f"method .*own.yaml: unknown key {unknown}"):
        load_config(write(tmp_path, f"method: {method}"))


def test_an_unknown_override_is_named_with_its_nearest(model: Path) -> None:
    with pytest.raises(UserError, match=r"--set: unknown key cache\.intervl; did you mean cache\.interval"):
        load_config(model, ["cache.intervl=5"])


def test_a_key_that_resembles_nothing_lists_what_there_is(model: Path) -> None:
    with pytest.raises(UserError, match="expected one of interval, branch"):
        load_config(model, ["cache.zzzzzz=5"])


@pytest.mark.parametrize(
    "override",
    [
        "cache.interval=five",
        "cache.interval=2.5",
        "cache.interval=null",
        "correction.cache=7x",
        "sampler.eta=much",
        "sampler.labels=3",
        "sampler.labels=[a]",
        "cache=5",
        "cache=null",
        "schedule=[dps]",
        "cache.interval.more=1",
        "calibration=[]",
        "calibration=3",
    ],
)
def test_a_wrong_type_is_refused(model: Path, override: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(model, [override])
    assert override.split("=")[0].split(".")[-1] in str(caught.value) or "expected" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("sampler: {labels: [[]]}", "labels[0]"),
        ("sampler: {labels: [1, x]}", "labels[1]"),
        ("sampler: {labels: {a: 1}}", "labels"),
        ("quant: {bits_map: [w8a8]}", "bits_map"),
        ("quant: {bits_map: {a: [w8a8]}}", "bits_map.a"),
        ("quant: {recon: {iterations: [1]}}", "iterations"),
    ],
)
def test_a_container_of_another_kind_or_content_is_refused_by_its_key(tmp_path: Path, text: str, key: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, f"cache: {{interval: 2}}\n{text}\n"))
    assert f"{key}: " in str(caught.value) and "\n" not in str(caught.value)


def test_values_nested_beyond_reason_are_one_line(tmp_path: Path) -> None:
    for text in ("a: " + "[" * 5000, "sampler: " + "{a: " * 2000, "model: " + "[" * 100 + "1" + "]" * 100):
        with pytest.raises(UserError):
            load_config(write(tmp_path, text))


def test_a_method_that_does_not_exist_is_refused_with_those_that_do(model: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_config(model, ["method=papper"])
    assert all(name in str(caught.value) for name in ("papper", *METHODS))
    assert method_path("paper").is_file() and method_path("own.yml") == Path("own.yml")
    with pytest.raises(UserError, match=r"no configuration file .*absent\.yaml"):
        load_config(model, ["method=absent.yaml"])


@pytest.mark.parametrize(
    "text",
    ["a: [1,", "- 1\n- 2", "just words", "a: b: c", "\t- x", "cache: {interval: 5", "a: !!python/none x"],
)
def test_what_is_no_configuration_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"model\.yaml"):
        load_config(write(tmp_path, text))


def test_a_file_that_is_not_text_or_not_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UserError, match=r"binary\.yaml"):
        load_config(path)
    for missing in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(UserError, match="no configuration file"):
            load_config(missing)


@pytest.mark.parametrize("override", ["cache.interval", "", "cache interval 5"])
def test_an_override_without_an_equals_sign_is_refused(model: Path, override: str) -> None:
    with pytest.raises(UserError, match=r"expected key=value, such as cache\.interval=5"):
        load_config(model, [override])


@pytest.mark.parametrize("override", ["=5", "cache.interval=[1", "a]b=1", "cache..interval=5", ".=1", "cache.=1"])
def test_an_override_that_does_not_parse_is_refused(model: Path, override: str) -> None:
    with pytest.raises(UserError):
        load_config(model, [override])


@pytest.mark.parametrize(
    "text",
    [
        "method: ${nowhere}",
        "cache: ${nowhere}",
        "cache: ???",
        "cache: {interval: ???}",
        "output: ${nowhere}",
    ],
)
def test_a_reference_to_nothing_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError):
        load_config(write(tmp_path, text))


def test_a_reference_to_another_key_is_followed(tmp_path: Path) -> None:
    path = write(tmp_path, "sampler: {steps: 40}\ncache: {interval: '${sampler.steps}'}\n")
    assert load_config(path).cache.interval == 40


# Dictionaries


SECTIONS = {f.name: f.default_factory for f in fields(RunConfig) if f.default_factory is not MISSING}


def test_every_section_is_a_dataclass() -> None:
    assert SECTIONS and all(is_dataclass(factory) for factory in SECTIONS.values())


@settings(deadline=None, max_examples=25)
@given(
    steps=st.integers(1, 500),
    eta=st.floats(0, 1),
    guidance=st.none() | st.floats(0, 50),
    labels=st.none() | st.lists(st.integers(), max_size=3),
    kind=st.sampled_from(["uniform", "power", "dps"]),
    bits=st.none() | st.integers(2, 8),
    name=st.text(max_size=8),
)
def test_a_configuration_survives_its_dictionary(
    steps: int,
    eta: float,
    guidance: float | None,
    labels: list[int] | None,
    kind: str,
    bits: int | None,
    name: str,
) -> None:
    base = RunConfig()
    config = replace(
        base,
        output=name.replace("$", "").replace("\\", "").replace("?", ""),
        sampler=replace(base.sampler, steps=steps, eta=eta, guidance_scale=guidance, labels=labels),
        cache=replace(base.cache, interval=min(7, steps)),
        schedule=replace(base.schedule, kind=kind),
        quant=replace(base.quant, ends_bits=bits),
    )
    plain = config_to_dict(config)
    assert plain == asdict(config)
    assert config_from_dict(plain) == config
    assert config_from_dict(json.loads(json.dumps(plain))) == config


def test_a_partial_dictionary_takes_the_defaults() -> None:
    assert config_from_dict({"cache": {"interval": 3}}) == replace(
        RunConfig(), cache=replace(RunConfig().cache, interval=3)
    )


@pytest.mark.parametrize(
    "values",
    [
        {"cash": {}},
        {"cache": {"intervall": 3}},
        {"cache": {"interval": "five"}},
        {"cache": {"interval": 0}},
        {"cache": 3},
        {"schedule": {"kind": "other"}},
        {"sampler": {"steps": 5}, "cache": {"interval": 6}},
    ],
    ids=str,
)
def test_a_dictionary_is_checked_like_a_file(values: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        config_from_dict(values)


def test_overrides_of_a_resolved_configuration_are_checked_and_leave_it_alone() -> None:
    base = RunConfig()
    changed = apply_overrides(base, ["cache.interval=3", "quant.ends_bits=null"])
    assert changed.cache.interval == 3 and changed.quant.ends_bits is None
    assert base == RunConfig() and apply_overrides(base, []) == base
    for bad in ("cache.intervall=3", "cache.interval=0", "cache.interval=x", "cache.interval"):
        with pytest.raises(UserError):
            apply_overrides(base, [bad])


def test_loading_does_not_touch_what_was_loaded_before(model: Path) -> None:
    first = load_config(model)
    second = load_config(model, ["cache.interval=3"])
    assert first.cache.interval == 5 and second.cache.interval == 3
    assert RunConfig() == RunConfig()


@pytest.mark.parametrize("value", ["[]", "3", "null", "text"])
def test_a_section_that_is_none_is_refused_where_the_base_has_one_too(tmp_path: Path, value: str) -> None:
    with pytest.raises(UserError, match=r"model\.yaml: calibration is .* expected a section of keys"):
        load_config(write(tmp_path, f"calibration: {value}\n"))
