"""What is written is read back, what is damaged is refused by name, a failed write leaves the old file."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cachequant.cache.feature_cache import FeatureCache
from cachequant.errors import UserError
from cachequant.quant.convert import LayerPlan, fresh_state
from cachequant.quant.layers import QuantLayer
from cachequant.storage import (
    content_hash,
    load_json,
    load_tensors,
    pack_correction,
    pack_maps,
    pack_quant,
    save_json,
    save_tensors,
    unpack_correction,
    unpack_maps,
    unpack_quant,
    write_atomically,
)
from cachequant.types import (
    AffineMap,
    Correction,
    QuantState,
    Schedule,
)
from tests.states import (
    NAMES,
    SEEDS,
    affine_maps,
    plan,
    quant_state,
    same_correction,
    same_maps,
    same_quant,
    same_tensor,
    table,
)

# Values


@settings(deadline=None, max_examples=40)
@given(affine_maps())
def test_maps_survive_their_flat_names(maps: dict[int, AffineMap]) -> None:
    assert same_maps(unpack_maps("cache", pack_maps("cache", maps)), maps)


def test_no_maps_are_no_tensors() -> None:
    assert pack_maps("cache", {}) == {} and unpack_maps("cache", {}) == {}


@settings(deadline=None, max_examples=20)
@given(affine_maps(forecast=True), affine_maps(forecast=False), SEEDS)
def test_a_map_without_forecast_among_forecasts_still_does_the_same(
    forecasts: dict[int, AffineMap], plain: dict[int, AffineMap], seed: int
) -> None:
    channels = len(next(iter(forecasts.values())).scale)
    first = AffineMap.identity(channels)
    maps = {**forecasts, 1000: first}
    back = unpack_maps("cache", pack_maps("cache", maps))
    x, older = torch.randn(2, 1, channels, 3, generator=torch.Generator().manual_seed(seed))
    for step in maps:
        assert torch.equal(back[step].apply(x, older), maps[step].apply(x, older))


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cache=affine_maps(), layers=st.dictionaries(NAMES, affine_maps(forecast=False), max_size=3))
def test_corrections_survive_a_file(
    tmp_path: Path, cache: dict[int, AffineMap], layers: dict[str, dict[int, AffineMap]]
) -> None:
    correction, path = Correction(cache, layers), tmp_path / "correction.safetensors"
    save_tensors(path, pack_correction(correction))
    assert same_correction(unpack_correction(load_tensors(path)), correction)


@pytest.mark.parametrize("seed", range(3))
def test_quantisation_states_survive_a_file(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "quant.safetensors"
    save_tensors(path, pack_quant(quant_state(seed)))
    assert same_quant(unpack_quant(load_tensors(path)), quant_state(seed))


def test_integer_weights_are_saved_as_bytes(tmp_path: Path) -> None:
    flat = pack_quant(quant_state())
    weights = {name: t for name, t in flat.items() if name.endswith(".weight")}
    assert len(weights) == 3 and all(t.dtype == torch.uint8 for t in weights.values())


def test_a_saved_layer_computes_what_it_computed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = nn.Sequential(nn.Conv2d(6, 5, 3, padding=1))
    state = fresh_state(source, {"0": LayerPlan(4, 8, split=4)}, "mse")
    rows = tuple(table(2, i) for i in range(2))
    state = QuantState({"0": replace(state.layers["0"], inputs=rows)})
    save_tensors(tmp_path / "q.safetensors", pack_quant(state))
    loaded = unpack_quant(load_tensors(tmp_path / "q.safetensors"))
    cache, layer = FeatureCache(Schedule((0, 2), 4, 2)), source[0]
    assert isinstance(layer, nn.Conv2d)
    x = torch.randn(2, 6, 5, 5)
    for cache.step in range(4):
        outputs = [QuantLayer(layer, s.layers["0"], cache)(x) for s in (state, loaded)]
        assert torch.equal(*outputs)


@pytest.mark.parametrize("lost", ["0.weight", "1.weight_scale", "0.input.bits", "1.weight_zero_point", "0.input.scale"])
def test_a_state_without_one_of_its_tensors_is_refused(lost: str) -> None:
    flat = pack_quant(quant_state())
    del flat[f"layers.up_blocks.0.resnets.1.conv1.{lost}"]
    with pytest.raises(UserError, match=f"lacks tensor .*{lost}"):
        unpack_quant(flat)


LAYER = "layers.up_blocks.0.resnets.1.conv1"
Change = Callable[[Tensor], Tensor]
FORGED: dict[str, tuple[str, Change]] = {
    "bits": ("0.weight_grid", lambda t: torch.cat([t[:1] * 0 + 99, t[1:]])),
    "huge": ("1.weight_grid", lambda t: t * 0 + 2**31 - 1),
    "no shape": ("0.weight_grid", lambda t: t[:0]),
    "type of weights": ("1.weight", lambda t: t.float()),
    "shape of weights": ("1.weight", lambda t: t.flatten()),
    "packed weights": ("0.weight", lambda t: t[:-1]),
    "scales": ("0.weight_scale", lambda t: t[:-1]),
    "widths": ("widths", lambda t: t + 1),
    "no widths": ("widths", lambda t: t[:0]),
    "steps fall": ("0.input.steps", lambda t: t.flip(0)),
    "steps below 0": ("0.input.steps", lambda t: t - 9),
    "steps are real": ("0.input.steps", lambda t: t.float()),
    "a scale of 0": ("0.input.scale", lambda t: t * 0),
    "a scale of nothing": ("0.input.scale", lambda t: t * float("nan")),
    "a short column": ("1.input.scale", lambda t: t[:-1]),
    "outside the grid": ("0.input.zero_point", lambda t: t + 256),
    "between grid points": ("0.input.zero_point", lambda t: t * 0 + 0.5),
    "a list of bits": ("0.input.bits", lambda t: t[None]),
    "activation bits": ("0.input.bits", lambda t: t + 40),
}


@pytest.mark.parametrize("what", FORGED)
def test_a_state_whose_tensors_are_not_of_its_format_is_refused(what: str) -> None:
    name, change = FORGED[what]
    flat = pack_quant(quant_state())
    with pytest.raises(UserError, match=r"the file is damaged, make it again") as caught:
        unpack_quant({**flat, f"{LAYER}.{name}": change(flat[f"{LAYER}.{name}"])})
    assert LAYER in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["steps", "scale", "shift", "previous"])
@pytest.mark.parametrize("change", [lambda t: t.double(), lambda t: t[None], lambda t: t[:0]])
def test_maps_that_are_not_of_their_format_are_refused(name: str, change: Change) -> None:
    flat = pack_maps("cache", plan().correction.cache)
    with pytest.raises(UserError, match="the file is damaged"):
        unpack_maps("cache", {**flat, f"cache.{name}": change(flat[f"cache.{name}"])})


def test_maps_whose_rows_do_not_match_are_refused() -> None:
    flat = pack_maps("cache", {1: AffineMap.identity(3), 2: AffineMap.identity(3)})
    with pytest.raises(UserError, match="2 steps for maps of shape"):
        unpack_maps("cache", {**flat, "cache.scale": flat["cache.scale"][:1], "cache.shift": flat["cache.shift"][:1]})


# Files


def test_one_tensor_under_two_names_is_saved_under_both(tmp_path: Path) -> None:
    shared = torch.arange(3.0)
    save_tensors(tmp_path / "t.safetensors", {"a": shared, "b": shared})
    loaded = load_tensors(tmp_path / "t.safetensors")
    assert same_tensor(loaded["a"], shared) and same_tensor(loaded["b"], shared)


def test_tensors_of_every_layout_are_saved(tmp_path: Path) -> None:
    x = torch.arange(24.0).reshape(2, 3, 2, 2)
    tensors = {
        "permuted": x.permute(3, 0, 1, 2),
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "half": x.half(),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3),
        "gradient": x.clone().requires_grad_(),
    }
    save_tensors(tmp_path / "t.safetensors", tensors)
    loaded = load_tensors(tmp_path / "t.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(same_tensor(loaded[name], tensors[name].detach()) for name in tensors)


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=JSON)
def test_json_survives_a_file_with_its_hash(tmp_path: Path, value: Any) -> None:
    save_json(tmp_path / "value.json", value)
    loaded = load_json(tmp_path / "value.json")
    assert loaded == value
    assert content_hash(loaded) == content_hash(value)


def test_content_hash_ignores_the_order_of_keys_and_nothing_else() -> None:
    assert content_hash({"a": 1, "b": [1, 2]}) == content_hash({"b": [1, 2], "a": 1})
    others = [{"a": 1, "b": [2, 1]}, {"a": 1.5, "b": [1, 2]}, {"a": 1}, {"a": "1", "b": [1, 2]}, None]
    assert len({content_hash(v) for v in [{"a": 1, "b": [1, 2]}, *others]}) == len(others) + 1


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    save_json(path, {"old": 1})

    def fail_half_way(temporary: Path) -> None:
        temporary.write_text("half")
        raise KeyboardInterrupt

    def full_disk(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail_half_way)
    with pytest.raises(UserError, match=r"file\.json: No space left on device"):
        write_atomically(path, full_disk)
    assert load_json(path) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_a_pipe_and_a_device_are_written_to_and_stay_what_they_are(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    save_json(pipe, {"a": 1})
    assert json.loads(os.read(reader, 100)) == {"a": 1} and pipe.is_fifo()
    os.close(reader)
    save_json(Path("/dev/null"), {"a": 1})
    assert Path("/dev/null").is_char_device() and [p.name for p in tmp_path.iterdir()] == ["pipe"]
    with pytest.raises(UserError, match="cannot write /dev/full: No space left on device"):
        save_json(Path("/dev/full"), {"a": 1})


def test_a_value_that_json_cannot_hold_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    save_json(path, {"old": 1})
    for bad in ({"x": float("nan")}, {"x": object()}):
        with pytest.raises((ValueError, TypeError)):
            save_json(path, bad)
    assert load_json(path) == {"old": 1}


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="cannot make folder"):
        save_json(tmp_path / "file" / "below" / "x.json", {})
    with pytest.raises(UserError, match="cannot make folder"):
        plan().save(tmp_path / "file")
    (tmp_path / "taken.json").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        save_json(tmp_path / "taken.json", {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "taken.json"]


def test_missing_and_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    for load in (load_json, load_tensors):
        with pytest.raises(UserError, match=r"no file .*absent"):
            load(tmp_path / "absent")
    path = tmp_path / "cut"
    for content in (b"", b"{", b"\xff\xfe", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(UserError, match="cut is damaged"):
            load_json(path)
    save_tensors(path, {"x": torch.zeros(100)})
    whole = path.read_bytes()
    for content in (
        b"",
        whole[:4],
        whole[:20],
        whole[:-1],
        b"\xff" * 8 + whole[8:],
        whole.replace(b"F32", b"F99"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match="cut is damaged"):
            load_tensors(path)
