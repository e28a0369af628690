"""Tiny random U-Nets of every kind of block that diffusers has, each with the arguments of one evaluation."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A network and the arguments of one evaluation."""

    network: nn.Module
    x: Tensor
    cond: Tensor | None

    def full(self, seed: int = 0) -> Tensor:
        """The network's own output."""
        name = "encoder_hidden_states" if self.conditional else "class_labels"
        cond = {} if self.cond is None else {name: self.cond}
        output: Tensor = self.network(self.x, TIMESTEP, **cond).sample
        return output

    @property
    def conditional(self) -> bool:
        return type(self.network).__name__ == "UNet2DConditionModel"


TIMESTEP = torch.tensor([10, 700])


def unconditional(**kwargs: Any) -> nn.Module:
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    settings = {
        "sample_size": 16,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (4, 8, 12),
        "layers_per_block": 2,
        "norm_num_groups": 2,
        "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DModel(**{**settings, **kwargs}).eval()


def conditional(**kwargs: Any) -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    settings = {
        "sample_size": 16,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (4, 8, 12),
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "attention_head_dim": 2,
        "cross_attention_dim": 6,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(**{**settings, **kwargs}).eval()


def make(kind: str) -> Case:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 16, 16, generator=generator)
    context = torch.randn(2, 5, 6, generator=generator)
    if kind == "unconditional":
        return Case(unconditional(), x, None)
    if kind == "one layer, class labels":
        blocks = {
            "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D",) * 2,
        }
        network = unconditional(layers_per_block=1, block_out_channels=(4, 8), num_class_embeds=3, **blocks)
        return Case(network, x, torch.tensor([2, 0]))
    if kind == "resnets resample":
        network = unconditional(downsample_type="resnet", upsample_type="resnet")
        return Case(network, x, None)
    if kind == "scale and shift":
        return Case(unconditional(resnet_time_scale_shift="scale_shift"), x, None)
    if kind == "churches":
        # LDM-8: every resampling is a resnet, time enters as scale and shift, attention at the coarse levels
        blocks = ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
        network = unconditional(
            down_block_types=blocks, up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
            downsample_type="resnet", upsample_type="resnet", resnet_time_scale_shift="scale_shift",
        )  # fmt: skip
        return Case(network, x, None)
    if kind == "conditional, resnets resample":
        network = conditional(
            layers_per_block=2, resnet_time_scale_shift="scale_shift",
            down_block_types=("CrossAttnDownBlock2D", "ResnetDownsampleBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "ResnetUpsampleBlock2D", "CrossAttnUpBlock2D"),
        )  # fmt: skip
        return Case(network, x, context)
    if kind == "stable diffusion":
        network = conditional(
            layers_per_block=2, block_out_channels=(4, 8, 12, 12), norm_num_groups=4, transformer_layers_per_block=2,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        )  # fmt: skip
        return Case(network, x, context)
    if kind == "conditional":
        return Case(conditional(), x, context)
    if kind == "conditional, two layers":
        return Case(conditional(layers_per_block=2), x, context)
    if kind == "conditional, layers differ":
        return Case(conditional(layers_per_block=(1, 2, 3)), x, context)
    if kind == "conditional, odd size":
        return Case(conditional(), torch.randn(2, 3, 18, 14, generator=generator), context)
    raise ValueError(kind)


KINDS = (
    "unconditional",
    "one layer, class labels",
    "resnets resample",
    "scale and shift",
    "churches",
    "conditional, resnets resample",
    "stable diffusion",
    "conditional",
    "conditional, two layers",
    "conditional, layers differ",
    "conditional, odd size",
)
