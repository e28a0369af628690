"""The graph runner's bookkeeping, with a recorder that runs the function again instead of replaying a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cachequant.cache.feature_cache import FeatureCache
from cachequant.models.adapter import adapter
from cachequant.pipeline.graphs import WARM_UP, CudaRecorder, GraphedAdapter
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


@pytest.fixture
def text_to_image():
    """A network with cross-attention on integers; its prompts had the same range at all steps."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    network = UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8,
        cross_attention_dim=24, attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip
    structure, clock = adapter(network), FeatureCache(SCHEDULE)
    plans = {
        name: LayerPlan(8, 8, structure.splits().get(name, 0))
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)
        and name not in structure.end_names() | structure.time_names()
    }
    handle = install(network, fresh_state(network, plans, "minmax"), clock, search="minmax")
    handle.set_mode(Mode.OBSERVE)
    for step in range(4):
        clock.step = step
        with torch.no_grad():
            network(sample(step) * (step + 1), 100 * step, prompt(0))
        handle.finish_step(step)
    state = handle.state
    handle.remove()
    made = deploy_on_device(network, state, clock, device=torch.device("cpu"))
    structure.rebuild()
    yield made, clock, structure
    made.remove()


def prompt(seed: int, tokens: int = 5) -> Tensor:
    return torch.randn(2, tokens, 24, generator=torch.Generator().manual_seed(seed)).clamp(-2, 2)


@torch.no_grad()
def test_keys_and_values_are_computed_once_a_prompt(text_to_image):
    made, clock, structure = text_to_image
    assert made.context is not None and len(made.context.attentions) == 4
    original, calls = made.context.project, []
    made.context.project = lambda module, context: calls.append(module) or original(module, context)
    graphed = GraphedAdapter(structure, clock, made.tables, Recorder(), made.context)
    text = prompt(1)
    changes = (
        (lambda: text, 8),  # every attention, once for the capture
        (lambda: text, 0),
        (lambda: text.mul_(0.5), 4),  # written to
        (text.clone, 4),  # the same values elsewhere: nobody knows
        (lambda: prompt(2, tokens=3), 8),  # another shape, and back
        (lambda: text, 4),
        (lambda: text, 0),
    )
    for step, (change, expected) in enumerate(changes):
        clock.step, context = step % 4, change()
        calls.clear()
        found, _ = graphed.full(sample(step), torch.tensor(100), encoder_hidden_states=context)
        assert len(calls) == expected
        plain, _ = structure.full(sample(step), torch.tensor(100), encoder_hidden_states=context)
        assert torch.equal(found, plain)


def test_a_layer_whose_grids_or_corrections_change_is_not_held(text_to_image):
    _, _, structure = text_to_image
    layers = [m for m in structure.denoiser.modules() if hasattr(m, "to_k") and m.is_cross_attention]
    assert all(m.to_k.constant and m.to_v.constant for m in layers)
    assert not structure.denoiser.down_blocks[0].resnets[0].conv1.constant  # its input grew from step to step


def test_a_recorder_warms_up_and_captures_on_its_own_stream_of_its_own_card(monkeypatch):
    """torch's own capture stream belongs to the card that was captured on first, whichever is current."""
    seen = []

    class Managed:
        def __init__(self, *what, **more):
            self.what = what, more

        def __enter__(self):
            seen.append(("in", *self.what))

        def __exit__(self, *_):
            seen.append(("out", *self.what))

    class Stream:
        def wait_stream(self, other):
            seen.append(("wait", other))

    class Graph:
        def pool(self):
            return "pool"

        def replay(self):
            seen.append("replay")

    streams = []
    monkeypatch.setattr(torch.cuda, "device", Managed)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: streams.append(Stream()) or streams[-1])
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", Managed)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Managed)
    record, results = CudaRecorder(torch.device("cuda:1")), (torch.ones(1),)
    for pool in (None, "pool"):
        seen.clear()
        replay = record(lambda: seen.append("body") or results)
        assert seen[0] == ("in", (torch.device("cuda:1"),), {}) and seen[-1][0] == "out"
        (captured,) = [event for event in seen if event[0] == "in" and len(event[1]) and isinstance(event[1][0], Graph)]
        assert captured[2] == {"pool": pool, "stream": streams[0]}
        assert seen.count("body") == WARM_UP + 1 and seen.index(captured) > seen.index("body")
        assert replay() is results and seen[-1] == "replay"
    assert len(streams) == 1
