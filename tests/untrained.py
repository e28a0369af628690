"""The latent miniatures and the judge of drawings as their training scripts make and export them, with random weights."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from cachequant.config import repository_folder

SCRIPTS = str(repository_folder() / "scripts" / "train")


def export_untrained(name: str, folder: Path) -> Path:
    """Write one of fashion-ldm, fashion-dit, drawings-sd and drawings-clip in float16, from seed 0; returns the folder.

    What training begins at zero (the transformer's adaptive norms and head) is drawn too, or its output would be zero.
    """
    sys.path.insert(0, SCRIPTS)
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    try:
        _EXPORTS[name](folder / name)
    finally:
        torch.random.set_rng_state(state)
        sys.path.remove(SCRIPTS)
    return folder / name


def _exporting(network: nn.Module) -> Any:
    """What the scripts' `export` takes: a trained module's averaged weights."""
    return SimpleNamespace(ema=_stirred(network), options=Namespace())


def _stirred(network: nn.Module) -> nn.Module:
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return network.eval()


def _ldm(folder: Path) -> None:
    import train_autoencoder
    import train_fashion_ldm

    train_fashion_ldm.export(_exporting(train_fashion_ldm.make_network()), train_autoencoder.make_vq(), folder)


def _dit(folder: Path) -> None:
    import train_autoencoder
    import train_fashion_dit

    first_stage = train_autoencoder.RECIPES["fashion-dit"].make()
    train_fashion_dit.export(_exporting(train_fashion_dit.make_network()), first_stage, folder)


def _tokenizer() -> Any:
    import drawings

    prompts = repository_folder() / "prompts" / "drawings_calibration.txt"
    return drawings.make_tokenizer(sorted(set(prompts.read_text(encoding="utf-8").splitlines())))


def _drawings(folder: Path) -> None:
    import train_autoencoder
    import train_drawings_sd

    tokenizer, first_stage = _tokenizer(), train_autoencoder.RECIPES["drawings-sd"].make()
    module = _exporting(train_drawings_sd.make_network(tokenizer))
    train_drawings_sd.export(module, first_stage, tokenizer, folder)


def _judge(folder: Path) -> None:
    import train_drawings_clip
    from training import half

    tokenizer = _tokenizer()
    network = train_drawings_clip.make_network(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)
    half(_stirred(network)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


_EXPORTS = {"fashion-ldm": _ldm, "fashion-dit": _dit, "drawings-sd": _drawings, "drawings-clip": _judge}
