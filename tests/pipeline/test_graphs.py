"""The graph runner's bookkeeping, with a recorder that runs the function again instead of replaying a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cachequant.cache.feature_cache import FeatureCache
from cachequant.models.adapter import adapter
from cachequant.pipeline.graphs import GraphedAdapter
from cachequant.quant.convert import LayerPlan, fresh_state, install
from cachequant.quant.deploy import deploy_on_device
from cachequant.quant.layers import Mode
from cachequant.types import Schedule

SCHEDULE = Schedule((0, 2), 4, 2)


class Recorder:
    """Replays by running the body; writes into the first results' memory, as a graph does."""

    def __init__(self) -> None:
        self.captured = 0

    def __call__(self, body):
        self.captured += 1
        made = body()

        def replay():
            for old, new in zip(made, body(), strict=True):
                old.copy_(new)
            return made

        return replay


@pytest.fixture
def network():
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip


@pytest.fixture
def deployment(network):
    """The network on integers with different rows at every step, its clock and its tables."""
    structure, clock = adapter(network), FeatureCache(SCHEDULE)
    names = [n for n, m in network.named_modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    plans = {name: LayerPlan(8, 8, structure.splits().get(name, 0)) for name in names}
    handle = install(network, fresh_state(network, plans, "minmax"), clock, search="minmax")
    handle.set_mode(Mode.OBSERVE)
    for step in range(4):
        clock.step = step
        with torch.no_grad():
            network(sample(step) * (step + 1), 100 * step)
        handle.finish_step(step)
    state = handle.state
    handle.remove()
    made = deploy_on_device(network, state, clock, device=torch.device("cpu"))
    yield made, clock, structure
    made.remove()


def sample(seed: int) -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def walk(adapter, clock: FeatureCache) -> list[Tensor]:
    """Four steps, two of them cached; outputs are kept, as a multistep scheduler does."""
    clock.reset()
    outputs = []
    for step in range(4):
        x, timestep = sample(10 + step) * (step + 1), torch.tensor(100 * step)
        if clock.must_refresh:
            output, feature = adapter.full(x, timestep)
            clock.store(feature)
        else:
            output = adapter.cached(x, timestep, None, clock.reuse(None))
        outputs.append(output)
        clock.advance(clock.must_refresh)
    return outputs


def test_replayed_steps_equal_plain_ones(deployment):
    made, clock, structure = deployment
    structure.rebuild()
    plain = walk(structure, clock)
    record = Recorder()
    graphed = GraphedAdapter(structure, clock, made.tables, record)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(walk(graphed, clock), plain, strict=True))
    assert record.captured == 2  # one full, one cached step, for all steps and runs


def test_a_new_shape_is_captured_anew_and_attributes_are_the_adapters(deployment):
    made, clock, structure = deployment
    record = Recorder()
    graphed = GraphedAdapter(structure, clock, made.tables, record)
    clock.reset()
    with torch.no_grad():
        for batch in (2, 1, 2):
            output, feature = graphed.full(sample(0)[:batch], 500)
            assert len(output) == len(feature) == batch
    assert record.captured == 2
    assert graphed.width == structure.width and graphed.splits() == structure.splits()


def test_a_network_without_integers_can_be_captured_too(network):
    clock, structure = FeatureCache(SCHEDULE), adapter(network)
    plain = walk(structure, clock)
    found = walk(GraphedAdapter(structure, clock, None, Recorder()), clock)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
