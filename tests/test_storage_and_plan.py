"""What is written is read back, what is damaged is refused by name, a failed write leaves the old file."""

import ast
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

import cachequant
from cachequant.cache.feature_cache import FeatureCache
from cachequant.config import RunConfig
from cachequant.errors import UserError
from cachequant.plan import ModelIdentity, Plan
from cachequant.quant.convert import LayerPlan, fresh_state
from cachequant.quant.layers import QuantLayer
from cachequant.storage import (
    content_hash,
    file_hash,
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
    ActivationTable,
    AffineMap,
    Correction,
    LayerQuant,
    QuantState,
    Schedule,
    WeightGrid,
)

SEEDS = st.integers(0, 2**31 - 1)
NAMES = st.sampled_from(["conv_in", "up_blocks.0.resnets.1.conv1", "a.b", "mid_block.attentions.0.to_out.0"])


@st.composite
def affine_maps(draw: st.DrawFn, forecast: bool | None = None) -> dict[int, AffineMap]:
    """Steps with maps of one width, all with a forecast term or none."""
    steps = draw(st.sets(st.integers(0, 999), min_size=1, max_size=6))
    channels, seed = draw(st.integers(1, 5)), draw(SEEDS)
    with_previous = draw(st.booleans()) if forecast is None else forecast
    generator = torch.Generator().manual_seed(seed)
    return {
        step: AffineMap(*(torch.randn(channels, generator=generator) for _ in range(3 if with_previous else 2)))
        for step in steps
    }


def table(rows: int, seed: int, bits: int = 8) -> ActivationTable:
    generator = torch.Generator().manual_seed(seed)
    return ActivationTable(
        torch.arange(0, 2 * rows, 2, dtype=torch.int32),
        torch.rand(rows, generator=generator) + 0.01,
        torch.randint(0, 2**bits, (rows,), generator=generator).float(),
        bits,
    )


def grid(shape: tuple[int, ...], seed: int, bits: int = 4) -> WeightGrid:
    generator = torch.Generator().manual_seed(seed)
    return WeightGrid(
        torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8),
        torch.rand(shape[0], generator=generator) + 0.01,
        torch.randint(0, 2**bits, (shape[0],), generator=generator).float(),
        bits,
    )


def quant_state(seed: int = 0) -> QuantState:
    """A split convolution, a linear layer that was not calibrated yet, and attention operands."""
    split = LayerQuant(
        (grid((5, 4, 3, 3), seed), grid((5, 2, 3, 3), seed + 1, 8)),
        (table(3, seed), table(3, seed + 1)),
        (4, 2),
    )
    plain = LayerQuant((grid((7, 6), seed + 2),), (table(0, seed, 4),), (6,))
    operands = {f"mid_block.attentions.0.{name}": table(4, seed, 8) for name in ("query", "probabilities")}
    return QuantState({"up_blocks.0.resnets.1.conv1": split, "time_embedding.linear_1": plain}, operands)


def plan(seed: int = 0, quantised: bool = True) -> Plan:
    generator = torch.Generator().manual_seed(seed)
    maps = {s: AffineMap(*(torch.randn(3, generator=generator) for _ in range(3))) for s in (1, 2, 4)}
    return Plan(
        replace(RunConfig(), method="paper", output="here"),
        ModelIdentity("UNet2DModel", "ab" * 32, "DDIMScheduler-0123456789ab", "none"),
        (900, 700, 500, 300, 100),
        Schedule((0, 3), 5, 3, cost=1.25, uniform_cost=1.5),
        Correction(maps, {"conv_in": {0: AffineMap.identity(4)}}),
        quant_state(seed) if quantised else None,
        {"seed": 1243, "versions": {"torch": "2"}, "costs": [0.5, 1e-30]},
    )


def same_tensor(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(a, b)


def same_maps(a: dict[int, AffineMap], b: dict[int, AffineMap]) -> bool:
    return a.keys() == b.keys() and all(
        same_tensor(a[s].scale, b[s].scale)
        and same_tensor(a[s].shift, b[s].shift)
        and same_tensor(a[s].previous, b[s].previous)
        for s in a
    )


def same_correction(a: Correction, b: Correction) -> bool:
    return (
        same_maps(a.cache, b.cache)
        and a.layers.keys() == b.layers.keys()
        and all(same_maps(a.layers[n], b.layers[n]) for n in a.layers)
    )


def same_table(a: ActivationTable, b: ActivationTable) -> bool:
    columns = ("steps", "scale", "zero_point")
    return a.bits == b.bits and all(same_tensor(getattr(a, c), getattr(b, c)) for c in columns)


def same_layer(a: LayerQuant, b: LayerQuant) -> bool:
    return (
        a.widths == b.widths
        and all(same_table(x, y) for x, y in zip(a.inputs, b.inputs, strict=True))
        and all(
            x.bits == y.bits
            and same_tensor(x.values, y.values)
            and same_tensor(x.scale, y.scale)
            and same_tensor(x.zero_point, y.zero_point)
            for x, y in zip(a.weights, b.weights, strict=True)
        )
    )


def same_quant(a: QuantState, b: QuantState) -> bool:
    return (
        a.layers.keys() == b.layers.keys()
        and a.operands.keys() == b.operands.keys()
        and all(same_layer(a.layers[n], b.layers[n]) for n in a.layers)
        and all(same_table(a.operands[n], b.operands[n]) for n in a.operands)
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


def unpicklers(tree: ast.AST) -> list[str]:
    """What could run code while it reads a file. `torch.load` may only be called, with a literal weights_only=True."""
    modules = {"pickle", "cPickle", "dill", "joblib", "shelve"}
    safe = {
        id(node.func)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in modules]
        elif isinstance(node, ast.ImportFrom):
            taken = {alias.name for alias in node.names} if node.module in ("torch", "numpy") else set()
            found += [str(node.module)] if (node.module or "").split(".")[0] in modules or "load" in taken else []
        elif isinstance(node, ast.Attribute) and node.attr == "load" and isinstance(node.value, ast.Name):
            unsafe = node.value.id in ("np", "numpy") or (node.value.id == "torch" and id(node) not in safe)
            found += [ast.unparse(node)] if unsafe else []
    return found


def test_nothing_in_the_package_unpickles() -> None:
    for path in Path(cachequant.__file__).parent.rglob("*.py"):
        assert not unpicklers(ast.parse(path.read_text(encoding="utf-8"))), path


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("torch.load(path, weights_only=True)", 0),
        ("torch.load(path)", 1),
        ("torch.load(path, weights_only=False)", 1),
        ("torch.load(path, weights_only=flag)", 1),
        ("read = torch.load", 1),
        ("from torch import load", 1),
        ("np.load(path)", 1),
        ("import pickle", 1),
        ("from dill import loads", 1),
        ("json.load(handle)", 0),
    ],
)
def test_the_search_for_unpicklers_finds_them(source: str, count: int) -> None:
    assert len(unpicklers(ast.parse(source))) == count


# Plans


@pytest.mark.parametrize("quantised", [True, False])
def test_a_plan_survives_its_folder(tmp_path: Path, quantised: bool) -> None:
    saved = plan(quantised=quantised)
    folder = saved.save(tmp_path / "new" / "plan")
    loaded = Plan.load(str(folder))
    for name in ("config", "identity", "timesteps", "schedule", "provenance"):
        assert getattr(loaded, name) == getattr(saved, name), name
    assert same_correction(loaded.correction, saved.correction)
    if saved.quant is None or loaded.quant is None:
        assert loaded.quant is saved.quant
    else:
        assert same_quant(loaded.quant, saved.quant)
    assert sorted(p.name for p in folder.iterdir()) == [
        "correction.safetensors", "plan.json", "quant.safetensors", "remainder.safetensors",
    ]  # fmt: skip
    assert loaded.summary() == saved.summary()


def test_saving_twice_gives_the_same_bytes_and_a_new_plan_replaces_the_old(tmp_path: Path) -> None:
    folder = plan(0).save(tmp_path)
    first = {p.name: file_hash(p) for p in folder.iterdir()}
    Plan.load(folder).save(folder)
    assert {p.name: file_hash(p) for p in folder.iterdir()} == first
    plan(1).save(folder)
    assert same_correction(Plan.load(folder).correction, plan(1).correction)


def edit(path: Path, **changes: Any) -> None:
    """Change plan.json as a person with an editor would, without its checksum."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"timesteps": [900, 700, 500, 300, 101]},
        {"quantised": False},
        {"files": {}},
        {"provenance": {}},
        {"more": 1},
        {"checksum": "0" * 64},
        {"schedule": {"refresh_steps": [0, 2], "num_steps": 5, "interval": 3, "cost": 1, "uniform_cost": 2}},
    ],
    ids=lambda c: next(iter(c)),
)
def test_an_edited_plan_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = plan().save(tmp_path)
    edit(folder / "plan.json", **changes)
    with pytest.raises(UserError, match=r"plan\.json was edited"):
        Plan.load(folder)


def test_white_space_is_no_edit(tmp_path: Path) -> None:
    folder = plan().save(tmp_path)
    edit(folder / "plan.json")
    assert Plan.load(folder).timesteps == plan().timesteps


@pytest.mark.parametrize("name", ["correction.safetensors", "quant.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "bit", "gone", "other"])
def test_a_damaged_tensor_file_is_refused(tmp_path: Path, name: str, damage: str) -> None:
    folder = plan().save(tmp_path)
    path = folder / name
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "bit":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "other":
        plan(1).save(tmp_path / "other")
        path.write_bytes((tmp_path / "other" / name).read_bytes())
    else:
        path.unlink()
    with pytest.raises(UserError, match=f"{name} is missing or was changed"):
        Plan.load(folder)


def test_what_is_no_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no plan in"):
        Plan.load(tmp_path)
    for content, message in (
        ("[]", "is not a plan"),
        ("{}", "is not a plan"),
        ('{"schema": 1}', "has schema 1, expected 3"),
        ('{"schema": "3"}', "has schema '3', expected 3"),
        ('{"schema": 3}', "was edited or cut short"),
        ('{"schema": 3,', "is damaged"),
        ("", "is damaged"),
    ):
        (tmp_path / "plan.json").write_text(content)
        with pytest.raises(UserError, match=message):
            Plan.load(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule": {"refresh_steps": [1], "num_steps": 5, "interval": 3}},
        {"schedule": {"refresh_steps": [0]}},
        {"schedule": None},
        {"identity": {"model": "UNet2DModel"}},
        {"config": {"cache": {"intervall": 3}}},
        {"config": {"cache": {"interval": 0}}},
        {"config": []},
        {"timesteps": None},
        {"timesteps": [900, 700, 500, 300]},
        {"timesteps": [900, 700, 500, 300, "100"]},
        {"schedule": {"refresh_steps": [0, 1.5], "num_steps": 5, "interval": 3}},
        {"identity": {"model": 1, "weights": "", "scheduler": "", "guidance": "none"}},
        {"provenance": []},
        {"provenance": {"consumers": [{"name": "conv_in"}]}},
        {"provenance": {"measured": {"dps_seconds": 1, "trajectories_seconds": 0, "ring_bytes": 1}}},
        {"files": []},
    ],
    ids=str,
)
def test_a_plan_of_impossible_values_is_refused_even_with_a_fitting_checksum(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    path = plan().save(tmp_path) / "plan.json"
    record = {**json.loads(path.read_text()), **changes}
    del record["checksum"]
    path.write_text(json.dumps({**record, "checksum": content_hash(record)}))
    with pytest.raises(UserError):
        Plan.load(tmp_path)


def test_a_plan_whose_record_lists_no_files_is_refused(tmp_path: Path) -> None:
    path = plan().save(tmp_path) / "plan.json"
    record = json.loads(path.read_text())
    del record["checksum"], record["files"]
    path.write_text(json.dumps({**record, "checksum": content_hash(record)}))
    with pytest.raises(UserError):
        Plan.load(tmp_path)


def test_provenance_by_step_survives(tmp_path: Path) -> None:
    folder = replace(plan(), provenance={"cost": {2: 0.5, 10: 0.25}}).save(tmp_path)
    assert Plan.load(folder).provenance["cost"] == {"2": 0.5, "10": 0.25}


def test_the_summary_names_what_matters() -> None:
    text = plan().summary()
    for expected in ("UNet2DModel", "5 evaluations", "[0, 3]", "W8A8 on 2 layers", "forecast", "1.25", "1.5"):
        assert expected in text
    assert "none" in plan(quantised=False).summary()
    long = replace(plan(), schedule=Schedule(tuple(range(40)), 50, 1))
    assert "…" in long.summary() and "39" not in long.summary().splitlines()[2]
