"""The cut of a U-Net on tiny random networks: with the feature of the same input it must change no bit."""

import itertools
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cachequant.cache.deepcache import (
    cache_site,
    decoder_concats,
    decoder_positions,
    shallow_module_names,
    shallow_view,
)
from cachequant.errors import UserError
from cachequant.models.adapter import Tap, adapter
from cachequant.models.unet import UNetAdapter
from cachequant.types import AffineMap
from tests.cache.unet_cases import KINDS, TIMESTEP, Case, make, unconditional


@pytest.fixture(autouse=True)
def without_gradient() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest) -> Case:
    return make(request.param)


def branches(network: nn.Module) -> range:
    return range(decoder_positions(network))


def identities(network: nn.Module) -> dict[str, int]:
    return {name: id(module) for name, module in network.named_modules()}


def test_the_cached_step_with_its_own_feature_is_the_full_step_bit_by_bit(case: Case) -> None:
    expected = case.full()
    for branch in branches(case.network):
        cut = UNetAdapter(case.network, branch)
        output, feature = cut.full(case.x, TIMESTEP, case.cond)
        assert torch.equal(output, expected), branch
        assert feature.shape[1] == cut.width
        assert torch.equal(cut.cached(case.x, TIMESTEP, case.cond, feature), expected), branch
        identity = AffineMap.identity(cut.width)
        assert torch.equal(cut.cached(case.x, TIMESTEP, case.cond, feature, identity), expected), branch


def test_another_feature_gives_another_output(case: Case) -> None:
    """So the equality above does not come from running the deep part again."""
    for branch in branches(case.network):
        cut = UNetAdapter(case.network, branch)
        output, feature = cut.full(case.x, TIMESTEP, case.cond)
        assert not torch.equal(cut.cached(case.x, TIMESTEP, case.cond, feature + 1), output)
        shifted = AffineMap(torch.ones(cut.width), torch.ones(cut.width))
        corrected = cut.cached(case.x, TIMESTEP, case.cond, feature, shifted)
        assert torch.equal(corrected, cut.cached(case.x, TIMESTEP, case.cond, feature + 1))


def test_the_feature_survives_the_step_that_reads_it(case: Case) -> None:
    for branch in branches(case.network):
        cut = UNetAdapter(case.network, branch)
        _, feature = cut.full(case.x, TIMESTEP, case.cond)
        before = feature.clone()
        cut.cached(case.x, TIMESTEP, case.cond, feature)
        cut.full(case.x + 1, TIMESTEP, case.cond)
        assert torch.equal(feature, before)


def test_no_more_than_the_feature_is_held(case: Case) -> None:
    for branch in branches(case.network):
        cut = UNetAdapter(case.network, branch)
        _, feature = cut.full(case.x, TIMESTEP, case.cond)
        assert feature.untyped_storage().nbytes() == feature.numel() * feature.element_size()
        held = weakref.ref(feature)
        cut.cached(case.x, TIMESTEP, case.cond, feature)
        del feature
        assert held() is None


def test_a_tap_that_stays_takes_nothing_in_cached_steps(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Tensor] = []
    put = Tap.put
    monkeypatch.setattr(Tap, "put", lambda tap, tensor: taken.append(tensor) or put(tap, tensor))
    for branch in branches(case.network):
        cut = UNetAdapter(case.network, branch)
        expected = [cut.full(x, TIMESTEP, case.cond) for x in (case.x, case.x + 1)]
        taken.clear()
        with cut.tapped() as run:
            for x, (output, feature) in zip((case.x, case.x + 1), expected, strict=True):
                found = run(x, TIMESTEP, case.cond)
                assert torch.equal(found[0], output) and torch.equal(found[1], feature)
                assert torch.equal(cut.cached(x, TIMESTEP, case.cond, feature), output)
        assert len(taken) == len(expected)


def test_the_network_is_left_as_it_was(case: Case) -> None:
    before, expected = identities(case.network), case.full()
    for branch in branches(case.network):
        cut = UNetAdapter(case.network, branch)
        _, feature = cut.full(case.x, TIMESTEP, case.cond)
        cut.cached(case.x, TIMESTEP, case.cond, feature)
        assert not cut.site.consumer._forward_pre_hooks
    assert identities(case.network) == before
    assert torch.equal(case.full(), expected)


def test_the_shallow_view_shares_every_parameter(case: Case) -> None:
    own = {p.data_ptr() for p in case.network.parameters()}
    counts = []
    for branch in branches(case.network):
        view, _ = shallow_view(case.network, branch + 1)
        parameters = list(view.parameters())
        assert {p.data_ptr() for p in parameters} <= own
        counts.append(sum(p.numel() for p in parameters))
    assert counts == sorted(counts) and counts[-1] < sum(p.numel() for p in case.network.parameters())


def test_exactly_the_shallow_modules_run_on_a_cached_step(case: Case) -> None:
    for branch in branches(case.network):
        cut = UNetAdapter(case.network, branch)
        _, feature = cut.full(case.x, TIMESTEP, case.cond)
        ran: set[str] = set()
        leaves = {
            name: module
            for name, module in case.network.named_modules()
            if isinstance(module, (nn.Conv2d, nn.Linear, nn.GroupNorm))
        }
        handles = [
            module.register_forward_hook(lambda *_, name=name, ran=ran: ran.add(name))
            for name, module in leaves.items()
        ]
        cut.cached(case.x, TIMESTEP, case.cond, feature)
        for handle in handles:
            handle.remove()
        assert ran == cut.shallow_names() & set(leaves), branch


def test_shallow_names_exclude_the_deep_part_and_grow_with_the_branch(case: Case) -> None:
    names = [shallow_module_names(case.network, branch + 1) for branch in branches(case.network)]
    for smaller, larger in itertools.pairwise(names):
        assert smaller < larger
    for shallow in names:
        assert not any(name.startswith("mid_block") for name in shallow)
        assert {"conv_in", "conv_out", "time_embedding.linear_1"} <= shallow
    first = {n for n in names[0] if n.startswith(("down_blocks", "up_blocks"))}
    last = len(case.network.up_blocks) - 1  # type: ignore[arg-type]
    position = len(case.network.up_blocks[-1].resnets) - 1  # type: ignore[index,union-attr,arg-type]
    assert all(n.startswith(f"up_blocks.{last}.") and f".{position}" in n for n in first)


def test_widths_add_up_to_what_each_resnet_reads(case: Case) -> None:
    seen: dict[int, tuple[int, int]] = {}
    previous: list[Tensor] = []
    resnets = list(decoder_concats(case.network))

    def watch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        previous.append(inputs[0])
        seen[id(module)] = (inputs[0].shape[1], len(seen))

    handles = [resnet.register_forward_pre_hook(watch) for resnet, _ in resnets]
    case.full()
    for handle in handles:
        handle.remove()
    assert len(resnets) == decoder_positions(case.network)
    for order, (resnet, width) in enumerate(resnets):
        total, position = seen[id(resnet)]
        assert position == order
        assert 0 < width < total
    # The h half of a position is what the position before it put out: both have its channels.
    for (before, _), (after, width) in itertools.pairwise(resnets):
        del after
        assert width == before.out_channels


def test_the_captured_feature_is_the_h_half_of_the_consumers_input(case: Case) -> None:
    for branch in branches(case.network):
        cut = UNetAdapter(case.network, branch)
        caught: list[Tensor] = []
        handle = cut.site.consumer.register_forward_pre_hook(lambda _, inputs, caught=caught: caught.append(inputs[0]))
        _, feature = cut.full(case.x, TIMESTEP, case.cond)
        handle.remove()
        assert torch.equal(feature, caught[0][:, : cut.width])


def test_splits_name_the_first_convolution_and_the_shortcut_of_every_position(case: Case) -> None:
    cut = UNetAdapter(case.network)
    splits = cut.splits()
    expected = {
        f"up_blocks.{i}.resnets.{j}.{child}"
        for i, block in enumerate(case.network.up_blocks)  # type: ignore[arg-type]
        for j, resnet in enumerate(block.resnets)
        for child in ("conv1", "conv_shortcut")
        if getattr(resnet, child) is not None
    }
    assert set(splits) == expected
    for name, width in splits.items():
        layer = case.network.get_submodule(name)
        assert isinstance(layer, nn.Conv2d)
        assert 0 < width < layer.in_channels
    for branch in branches(case.network):
        cut = UNetAdapter(case.network, branch)
        assert cut.consumers()
        for name in (consumer.name for consumer in cut.consumers()):
            assert case.network.get_submodule(name.rpartition(".")[0]) is cut.site.consumer
            assert splits[name] == cut.width and name in cut.shallow_names()


def test_a_branch_that_does_not_exist_is_refused(case: Case) -> None:
    positions = decoder_positions(case.network)
    for branch in (-1, positions, 1000):
        with pytest.raises(UserError, match=f"cache.branch is {branch}, expected 0 to {positions - 1}"):
            cache_site(case.network, branch)
        with pytest.raises(UserError, match=f"cache.branch is {branch}"):
            adapter(case.network, branch)


def test_rebuilding_follows_replaced_modules(case: Case) -> None:
    cut = UNetAdapter(case.network)
    ran: list[int] = []

    class Counting(nn.Module):
        """Calls another module and counts."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Any:
            ran.append(1)
            return self.inner(x)

    original = case.network.get_submodule("conv_out")
    case.network._modules["conv_out"] = Counting(original)
    try:
        cut.rebuild()
        _, feature = cut.full(case.x, TIMESTEP, case.cond)
        cut.cached(case.x, TIMESTEP, case.cond, feature)
        assert len(ran) == 2
    finally:
        case.network._modules["conv_out"] = original


def test_an_error_inside_the_network_leaves_no_hook_and_no_feature(case: Case) -> None:
    cut = UNetAdapter(case.network)
    _, feature = cut.full(case.x, TIMESTEP, case.cond)
    wrong = case.x[:, :1]
    with pytest.raises(RuntimeError):
        cut.full(wrong, TIMESTEP, case.cond)
    with pytest.raises(RuntimeError):
        cut.cached(wrong, TIMESTEP, case.cond, feature)
    assert not cut.site.consumer._forward_pre_hooks
    view, _ = shallow_view(case.network, 1)
    with pytest.raises(RuntimeError, match="before a feature was set"):
        cut._run(view, case.x, TIMESTEP, case.cond, {})


def test_end_and_time_names_are_those_of_the_structure(case: Case) -> None:
    cut = UNetAdapter(case.network)
    layers = {n for n, m in case.network.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert cut.end_names() <= layers
    timed = cut.time_names() & layers
    calls: dict[str, set[tuple[int, ...]]] = {n: set() for n in layers}
    handles = [
        case.network.get_submodule(n).register_forward_pre_hook(
            lambda _, inputs, n=n: calls[n].add(tuple(inputs[0].shape))
        )
        for n in layers
    ]
    case.full()
    for handle in handles:
        handle.remove()
    flat = {n for n, shapes in calls.items() if all(len(s) == 2 for s in shapes)}  # no pixels, no tokens
    assert timed == flat


def test_residuals_of_a_control_network_are_taken_by_both_kinds_of_step() -> None:
    case = make("conditional")
    generator = torch.Generator().manual_seed(5)
    caught: list[Tensor] = []
    handle = case.network.get_submodule("mid_block").register_forward_hook(lambda *a: caught.append(a[2]))
    skips: list[Tensor] = []
    hooks = [case.network.get_submodule("conv_in").register_forward_hook(lambda *a: skips.append(a[2]))]
    for block in case.network.down_blocks:  # type: ignore[union-attr]
        hooks.append(block.register_forward_hook(lambda *a: skips.extend(a[2][1])))
    case.full()
    for hook in (handle, *hooks):
        hook.remove()
    residuals: dict[str, Any] = {
        "down_block_additional_residuals": tuple(torch.randn(s.shape, generator=generator) for s in skips),
        "mid_block_additional_residual": torch.randn(caught[0].shape, generator=generator),
    }
    plain = case.full()
    for branch in branches(case.network):
        cut = UNetAdapter(case.network, branch)
        output, feature = cut.full(case.x, TIMESTEP, case.cond, **residuals)
        assert not torch.equal(output, plain)
        assert torch.equal(cut.cached(case.x, TIMESTEP, case.cond, feature, **residuals), output), branch


def test_an_adapter_is_found_for_networks_and_pipelines_and_refused_for_others() -> None:
    @dataclass
    class Pipeline:
        unet: nn.Module

    network = unconditional()
    assert adapter(Pipeline(network)).denoiser is network
    assert adapter(network, 2).width == cache_site(network, 2).width
    with pytest.raises(UserError, match="Linear is not supported"):
        adapter(nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"without \.unet or \.transformer"):
        adapter(object())
    with pytest.raises(UserError, match="no list 'down_blocks'"):
        cache_site(nn.ModuleDict({"conv_in": nn.Conv2d(1, 1, 1)}), 0)
