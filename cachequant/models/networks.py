"""diffusers networks with the one detail that keeps an original checkpoint from running in them unchanged."""

from __future__ import annotations

import functools
from typing import Any

from diffusers import DiTTransformer2DModel, ModelMixin, UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import Timesteps


class FixedHeadsUNet2DModel(UNet2DModel, ModelMixin):
    """`UNet2DModel` whose attention has equally many heads at every level, as `num_heads` of LDM-8 churches asks for.

    diffusers' class knows heads of equal width only.

    Args:
        num_attention_heads: heads of every attention layer.
        settings: of `UNet2DModel`.
    """

    def __init__(self, num_attention_heads: int = 8, **settings: Any) -> None:
        super().__init__(**{**settings, "attention_head_dim": None})
        self.register_to_config(num_attention_heads=num_attention_heads)
        for module in self.modules():
            if isinstance(module, Attention):
                width = module.inner_dim // num_attention_heads
                module.heads = module.sliceable_head_dim = num_attention_heads
                module.scale = width**-0.5

    @staticmethod
    def _get_init_keys(input_class: type) -> set[str]:
        """What a saved configuration may hold; diffusers reads it from `__init__`, which takes the rest by name."""
        return {"num_attention_heads", *UNet2DModel._get_init_keys(UNet2DModel)}


class OriginalDiT(DiTTransformer2DModel, ModelMixin):
    """`DiTTransformer2DModel` with the original's timestep frequencies, 10⁻⁴ to the power i/128 (Peebles and Xie).

    diffusers' class divides by 127, so at large timesteps its embedding differs from what the weights were trained with.
    """

    @functools.wraps(DiTTransformer2DModel.__init__)  # type: ignore[misc]  # diffusers reads the arguments from it
    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        for module in self.modules():
            if isinstance(module, Timesteps):
                module.downscale_freq_shift = 0
