"""Conversion: every format and set of weights, what is written, and one line for everything that does not fit."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cachequant.cli import main
from cachequant.config import ModelConfig
from cachequant.errors import UserError
from cachequant.models.loading import identify, load_pipeline
from cachequant.models.original.convert import convert
from cachequant.models.original.keymap import Source
from tests.models.original.miniature import DDPM, LATENT, changed, ddpm_weights, latent_weights, write
from tests.models.original.reference import Golden, error, original_weights


def test_a_fused_projection_is_cut_by_heads_or_by_kind() -> None:
    fused = torch.arange(12.0)[:, None]  # two heads of two channels: q0 q1 k0 k1 v0 v1, then the second head's
    per_head = [Source("qkv", part, lambda _: 2).take(fused).flatten().tolist() for part in range(3)]
    assert per_head == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    by_kind = [Source("qkv", part).take(fused).flatten().tolist() for part in range(3)]
    assert by_kind == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


LAYOUTS = {
    "plain": lambda raw, ema: raw,
    "data parallel": lambda raw, ema: {f"module.{k}": v for k, v in raw.items()},
    "training list": lambda raw, ema: [raw, {"state": {}}, 3, 100, ema],
    "raw and ema": lambda raw, ema: {"model": raw, "ema": ema, "opt": {}, "args": argparse.Namespace(lr=1e-4)},
    "training list without ema": lambda raw, ema: [raw, {"state": {}}, 3, 100],
    "raw only": lambda raw, ema: {"model": raw, "opt": {}},
    "lightning": lambda raw, ema: {"state_dict": raw, "global_step": 7, "callbacks": {}},
}


@pytest.mark.parametrize("weights", ["auto", "raw"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_weights_that_were_asked_for(tmp_path: Path, layout: str, weights: str) -> None:
    raw, ema = ddpm_weights(0), ddpm_weights(1)
    path, config = write(tmp_path, LAYOUTS[layout](raw, ema), DDPM)
    made = convert(path, "ddpm-cifar10", config, weights)
    both = layout in ("training list", "raw and ema")
    assert made.weights == ("only" if not both else "ema" if weights == "auto" else "raw")
    expected = ema if made.weights == "ema" else raw
    assert torch.equal(made.pipe.unet.conv_in.weight, expected["conv_in.weight"])
    assert torch.equal(made.pipe.unet.mid_block.attentions[0].to_k.weight, expected["mid.attn_1.k.weight"])


def test_safetensors_are_read_too(tmp_path: Path) -> None:
    raw = ddpm_weights()
    _, config = write(tmp_path, raw, DDPM)
    save_file(raw, tmp_path / "model.safetensors")
    made = convert(tmp_path / "model.safetensors", "ddpm-cifar10", config)
    assert torch.equal(made.pipe.unet.conv_out.weight, raw["conv_out.weight"])


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_latent_ema_and_what_is_left_over(tmp_path: Path, weights: str) -> None:
    state = latent_weights(ema=True)
    path, config = write(tmp_path, {"state_dict": state, "optimizer_states": [1]}, LATENT)
    made = convert(path, "ldm4-bedroom", config, weights)
    stem = (
        "model_ema.diffusion_modelinput_blocks00weight"
        if weights == "ema"
        else "model.diffusion_model.input_blocks.0.0.weight"
    )
    assert torch.equal(made.pipe.unet.conv_in.weight, state[stem])
    unused = {key for keys in made.unused.values() for key in keys}
    assert made.used | unused == {*state, "optimizer_states"}
    assert {"betas", "first_stage_model.loss.logvar", "model_ema.decay", "optimizer_states"} <= unused


def test_a_stray_counter_is_no_second_set_of_weights(tmp_path: Path) -> None:
    path, config = write(tmp_path, {**latent_weights(), "model_ema.decay": torch.tensor(0.9)}, LATENT)
    made = convert(path, "ldm4-bedroom", config)
    assert made.weights == "only"
    assert ["model_ema.decay"] in made.unused.values()


def test_converting_back_gives_the_checkpoint(tmp_path: Path) -> None:
    from cachequant.models.original.recipes import latent_recipe

    state = latent_weights()
    path, config = write(tmp_path, state, LATENT)
    made = convert(path, "ldm4-bedroom", config)
    for network in latent_recipe(LATENT, state, "").networks:
        for key, value in original_weights(network, getattr(made.pipe, network.component)).items():
            assert torch.equal(value.reshape(state[key].shape), state[key]), key


def test_the_command_writes_a_folder_that_loads_and_says_what_it_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, config = write(tmp_path, [ddpm_weights(), {}, 1, 2, ddpm_weights(1)], DDPM, "ckpt.pth")
    out, facts = tmp_path / "made" / "folder", tmp_path / "facts.json"
    arguments = ["convert", "--family", "ddpm-cifar10", "--config", str(config), str(path), str(out)]
    assert main([*arguments, "--json", str(facts)]) == 0
    shown, written = capsys.readouterr(), json.loads(facts.read_text())
    assert shown.err == ""
    assert "weights      EMA" in shown.out
    assert written["weights"] == "ema"
    assert written["unused"]["training state beside the weights"][0] == "optimiser state (entry 1)"
    assert written["parameters"]["unet"] == sum(v.numel() for v in ddpm_weights().values())
    direct = load_pipeline(ModelConfig(str(path), "", "ddpm-cifar10", str(config)), "cpu")
    loaded = load_pipeline(out, "cpu")
    assert sorted(p.name for p in out.parent.iterdir()) == ["folder"]
    assert identify(loaded, None) == identify(direct, None)  # so a plan for one is a plan for the other
    assert main(arguments) == 2
    assert "is there already, expected a new or an empty folder" in capsys.readouterr().err


class Foreign:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def cases(folder: Path) -> dict[str, tuple[list[str], str]]:
    """Wrong inputs: arguments of `convert` without the output, and what the one line must say."""

    def given(name: str, content: Any, settings: dict[str, Any], family: str) -> list[str]:
        (folder / name).mkdir()
        path, config = write(folder / name, content, settings)
        return ["--family", family, "--config", str(config), str(path)]

    latent, unet = latent_weights(), "model__params__unet_config__params__"
    small = given("small", ddpm_weights(), DDPM, "ddpm-cifar10")
    cut = given("cut", ddpm_weights(), DDPM, "ddpm-cifar10")
    Path(cut[-1]).write_bytes(Path(cut[-1]).read_bytes()[:-1000])
    page = given("page", {}, DDPM, "ddpm-cifar10")
    Path(page[-1]).write_text("<html>404</html>")
    ldm = "ldm4-bedroom"
    return {
        "other family": (
            given("a", latent, LATENT, "ldm8-church"), r"model.ckpt is a ldm4-bedroom checkpoint, expected ldm8-church"
        ),
        "no family": (given("b", {"x": torch.zeros(1)}, DDPM, ldm), "model.ckpt holds x, …, expected a checkpoint of"),
        "truncated": (cut, "cannot be read: truncated, or not a checkpoint"),
        "a page": (page, "cannot be read: truncated, or not a checkpoint"),
        "nothing there": ([*small[:-1], str(folder / "none.ckpt")], "no checkpoint"),
        "no YAML": ([*small[:3], str(folder / "none.yaml"), small[-1]], "no configuration file"),
        "code": (given("c", {**ddpm_weights(), "z": Foreign()}, DDPM, "ddpm-cifar10"), "refused, since loading"),
        "a module": (given("d", torch.nn.Linear(1, 1), DDPM, "ddpm-cifar10"), "holds torch.nn.modules.linear.Linear"),
        "no tensors": (given("e", {"epoch": 3}, DDPM, "ddpm-cifar10"), "holds no weights"),
        "other channels": (
            given("f", ddpm_weights(), changed(DDPM, model__ch=64), "ddpm-cifar10"),
            r"expects \[256, 64\] for the denoiser's time_embedding|expects \[64, 3, 3, 3\] for the denoiser's conv_in",
        ),
        "other resolution": (
            given("g", ddpm_weights(), changed(DDPM, data__image_size=32), "ddpm-cifar10"), "has no place in this model"
        ),
        "other latents": (
            given("h", latent, changed(LATENT, model__params__image_size=16), ldm),
            "latents of 16 and images of 32 pixels, expected a ratio of 4",
        ),
        "other betas": (
            given("i", latent, changed(LATENT, model__params__linear_end=0.012), ldm),
            "1000 betas from 0.0015 to 0.0195, the configuration says 1000 from 0.0015 to 0.012",
        ),
        "other first stage": (
            given("j", latent, changed(LATENT, model__params__first_stage_config__target="x.AutoencoderKL"), ldm),
            "the configuration has: KL-f4 first stage, conditioning: none; ldm4-bedroom has: VQ-f4",
        ),
        "option missing": (
            given("k", latent, {"model": {"params": {}}}, ldm), "configuration lacks first_stage_config"
        ),
        "option unknown": (
            given("l", latent, changed(LATENT, **{f"{unet}num_classes": 10}), ldm), "unet_config.params.num_classes"
        ),
        "odd width": (
            given("n", latent, changed(LATENT, **{f"{unet}model_channels": 40}), ldm), "no network can be built"
        ),
        "odd levels": (
            given("o", latent, changed(LATENT, **{f"{unet}channel_mult": 3}), ldm), "no network can be built"
        ),
        "other option": ([*small, "--vae", "x/y"], "--vae is for dit-xl2, expected none for ddpm-cifar10"),
        "no EMA": ([*small, "--weights", "ema"], "holds one set of weights, expected an EMA copy"),
        "half an EMA": (
            given("m", [ddpm_weights(), {}, 1, 2, {"conv_in.bias": torch.zeros(32)}], DDPM, "ddpm-cifar10"),
            "lacks ema.temb|lacks ema.conv_in.weight",
        ),
        "released sizes": ([*small[:2], small[-1]], "expects"),
    }  # fmt: skip


NAMES = (
    "other family", "no family", "truncated", "a page", "nothing there", "no YAML", "code", "a module", "no tensors",
    "other channels", "other resolution", "other latents", "other betas", "other first stage", "option missing",
    "option unknown", "odd width", "odd levels", "other option", "no EMA", "half an EMA", "released sizes",
)  # fmt: skip


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[str], str]]:
    """The files of `cases`, written once."""
    return cases(tmp_path_factory.mktemp("wrong"))


def test_every_wrong_input_is_tried(wrong: dict[str, Any]) -> None:
    assert set(wrong) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_input_is_one_line(
    wrong: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments, message = wrong[name]
    monkeypatch.chdir(tmp_path)
    assert main(["convert", *arguments, str(tmp_path / "out")]) == 2
    shown = capfd.readouterr()
    with pytest.raises(UserError, match=message):
        raise UserError(shown.err)
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []  # nothing written, nothing run


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "kind"), [("ldm8-church", "unet"), ("ldm4-imagenet", "unet"), ("dit-xl2", "transformer")]
)
def test_a_folder_of_a_reference_model_computes_the_same(
    golden: Golden, tmp_path: Path, family: str, kind: str
) -> None:
    data = golden.tensors(family)
    golden.convert(family, "auto").save(tmp_path / "folder")
    pipe = load_pipeline(tmp_path / "folder", "cpu")
    network = getattr(pipe, kind)
    got: Tensor
    if family == "dit-xl2":
        got = network(data["x"], timestep=data["t"], class_labels=data["y"]).sample
        assert pipe.vae is None
    else:
        context = {"encoder_hidden_states": data["context"]} if "context" in data else {}
        got = network(data["x"], data["t"], **context).sample
    assert error(got, data[{"ldm8-church": "ema_eps", "ldm4-imagenet": "eps", "dit-xl2": "out"}[family]]) <= 5e-5
