"""The latent miniatures' training on a handful of images: budgets, losses, exports that load, one-line errors."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from cachequant.config import repository_folder
from cachequant.errors import UserError
from cachequant.models.loading import load_pipeline

SMALL = ["--steps", "1", "--batch-size", "2", "--device", "cpu", "--checkpoint-every", "1"]


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(repository_folder() / "scripts" / "train"))


def fashion(split: str, folder: Path | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(split))
    return torch.randint(0, 256, (30, 28, 28), dtype=torch.uint8, generator=generator), torch.arange(30).byte() % 10


def places(tmp_path: Path, name: str) -> list[str]:
    return ["--run", str(tmp_path / "run" / name), "--out", str(tmp_path / name)]


def options(**changed: Any) -> argparse.Namespace:
    import training

    made = training.parser("", "x", steps=10, batch_size=4, lr=1e-3).parse_args(["--device", "cpu"])
    return argparse.Namespace(**{**vars(made), **changed})


@pytest.mark.slow
@pytest.mark.parametrize(("name", "first_stage"), [("fashion-ldm", "vqvae"), ("fashion-dit", "vae")])
@pytest.mark.filterwarnings("ignore")  # Lightning advises on workers, logging and precision
def test_class_conditional_training_exports_what_loads(
    name: str, first_stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train_autoencoder
    import train_fashion_dit
    import train_fashion_ldm

    script = {"fashion-ldm": train_fashion_ldm, "fashion-dit": train_fashion_dit}[name]
    for module in (train_autoencoder, script):
        monkeypatch.setattr(module, "load_fashion_mnist", fashion)
    with pytest.raises(UserError, match="train_autoencoder"):
        script.main([*SMALL, *places(tmp_path, name), "--samples", "0"])
    train_autoencoder.main([name, *SMALL, *places(tmp_path, f"{name}/{first_stage}")])
    script.main([*SMALL, *places(tmp_path, name), "--samples", "0"])
    again = [*SMALL, "--steps", "2", *places(tmp_path, name), "--samples", "0"]
    script.main([*again, "--resume", "--start-from", str(tmp_path / name)])
    assert json.loads((tmp_path / name / "training.json").read_text())["steps"] == 2
    pipe = load_pipeline(tmp_path / name, "cpu")
    pipe.set_progress_bar_config(disable=True)
    images = pipe(class_labels=[3, 8], guidance_scale=1.5, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 32, 32, 1)
    stage = getattr(pipe, first_stage)
    x = train_autoencoder.to_model_range(fashion("train")[0])
    assert float((train_autoencoder.encode(stage, x) * stage.config.scaling_factor).std()) == pytest.approx(1, abs=0.02)


def test_the_bound_is_the_divergence_of_the_two_gaussians() -> None:
    from train_fashion_dit import variational_bound

    generator = torch.Generator().manual_seed(0)
    betas = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)
    alpha_bar = (1 - betas).cumprod(0)
    t = torch.tensor([1, 40, 999])
    x0, noise, error, fraction = torch.randn(4, 3, 2, 4, 4, generator=generator, dtype=torch.float64)
    ab, beta = (v[t].view(-1, 1, 1, 1) for v in (alpha_bar, betas))
    before = alpha_bar[t - 1].view(-1, 1, 1, 1)
    x_t = ab.sqrt() * x0 + (1 - ab).sqrt() * noise
    epsilon = noise + 0.1 * error
    tilde = beta * (1 - before) / (1 - ab)

    def mean(clean: Tensor) -> Tensor:  # DDPM, equation 7
        return before.sqrt() * beta / (1 - ab) * clean + (1 - beta).sqrt() * (1 - before) / (1 - ab) * x_t

    predicted = (x_t - (1 - ab).sqrt() * epsilon) / ab.sqrt()
    log_variance = 0.5 * ((1 + fraction) * beta.log() + (1 - fraction) * tilde.log())
    p, q = Normal(mean(predicted), (0.5 * log_variance).exp()), Normal(mean(x0), tilde.sqrt())
    expected = kl_divergence(q, p).flatten(1).mean(1) / torch.tensor(2.0).log()
    torch.testing.assert_close(variational_bound(x0, x_t, epsilon, fraction, t, betas), expected, rtol=1e-4, atol=1e-6)
    exact = variational_bound(x0, x_t, noise, -torch.ones_like(x0), t, betas)
    assert exact.abs().max() < 1e-6  # the true posterior costs nothing
    first = variational_bound(x0[:1], x0[:1], 0 * x0[:1], 0 * x0[:1], torch.zeros(1, dtype=torch.long), betas)
    assert first.isfinite().all()


def test_the_transformer_begins_as_zero_and_drops_no_label_itself() -> None:
    from train_fashion_dit import NO_CLASS, make_network

    transformer = make_network()["transformer"].train()
    tables = [block.norm1.emb.class_embedder for block in transformer.transformer_blocks]
    assert all(table.dropout_prob == 0.0 and not table.embedding_table.weight[10:NO_CLASS].any() for table in tables)
    assert len(tables) >= 12
    assert not transformer(torch.randn(2, 4, 16, 16), torch.tensor([3, 900]), torch.tensor([0, NO_CLASS])).sample.any()


def test_codes_that_nobody_chose_move_to_latents_and_the_others_stay() -> None:
    from train_autoencoder import CODES, Autoencoder, make_vq

    torch.manual_seed(0)
    module = Autoencoder(make_vq(), torch.randn(8, 1, 32, 32), mirror=False, options=options())
    before = module.network.quantize.embedding.weight.clone()
    module.code_used[:100] = True
    module.revive_codes()
    after = module.network.quantize.embedding.weight
    assert after[:100].equal(before[:100]) and not module.code_used.any()
    latents = module.network.encode(module.images).latents.permute(0, 2, 3, 1).reshape(-1, 3)
    assert torch.cdist(after[100:], latents, compute_mode="donot_use_mm_for_euclid_dist").min(1).values.max() < 1e-5
    assert len(after) == CODES and module.ema.quantize.embedding.weight[100:].equal(after[100:])


def test_the_budget_ends_with_the_steps_or_the_time_and_counts_earlier_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    import training

    now = 1000.0
    monkeypatch.setattr(training, "PROCESS_START", now)
    monkeypatch.setattr(training.time, "perf_counter", lambda: now)
    now = 1060.0  # a minute of imports
    budget = training.Budget(steps=100, minutes=3.0)
    assert budget.progress(0) == 0.0 and budget.progress(25) == 0.25 and budget.progress(200) == 1.0
    now = 1120.0  # half of the two minutes that are left
    assert budget.progress(0) == 0.5 and budget.seconds == 60.0
    budget.seconds_before = 120.0  # an earlier run as long as this one may be
    assert budget.progress(0) == pytest.approx((120.0 + 60.0) / (120.0 + 120.0))
    now = 1180.0
    assert budget.progress(0) == 1.0
