"""Keys and values of cross-attention, which the prompt alone determines: computed once a prompt, not at every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Project = Callable[[Any, Tensor], list[Tensor]]
"""Key and value [B, M, C] of an attention module from a context [B, M, E]."""

Fill = Callable[[], tuple[Tensor, ...]]
"""Computes keys and values, again and again at the same addresses."""

Kind = tuple[tuple[int, ...], torch.dtype, torch.device]
"""What tells contexts apart whose keys and values need memory of their own."""


class ContextOperands:
    """Holds key and value of every cross-attention whose integers and epilogues are the same at all steps.

    A captured step reads them at fixed addresses; `update` fills these whenever the context is another tensor, or was
    written to, since the last call. They are captured too: from Python these products took as long as several cached steps.

    Args:
        attentions: modules whose `to_k` and `to_v` are deployed and constant.
        project: computes their key and value.
    """

    def __init__(self, attentions: list[Any], project: Project) -> None:
        self.attentions, self.project = attentions, project
        self._seen: tuple[Tensor, int] | None = None
        self._kind: Kind | None = None  # of the last context
        self._filled: dict[Kind, tuple[Tensor, Fill]] = {}  # kind -> fixed memory of the context, what fills the rest
        self._held: dict[int, list[Tensor]] = {}  # of the last context, by module
        self._reading = False
        for module in attentions:
            module.to_k.context = self

    @staticmethod
    def of(network: nn.Module, project: Project) -> ContextOperands | None:
        """Those of a deployed network; None without any."""
        modules: list[Any] = [m for m in network.modules() if hasattr(m, "to_k") and hasattr(m, "to_v")]
        found = [
            module
            for module in modules
            if getattr(module, "is_cross_attention", False)
            and all(getattr(layer, "constant", False) for layer in (module.to_k, module.to_v))
        ]
        return ContextOperands(found, project) if found else None

    def update(self, context: Tensor, record: Callable[[Fill], Fill]) -> None:
        """Compute key and value of [B, M, E] anew unless it is what the last call was given.

        Tensors of inference mode do not count their changes, and are computed every time.

        Args:
            context: the prompt's embedding, or a class's.
            record: makes a replay of a function, whose results stay where they are; used once for every kind of context.

        Raises:
            RuntimeError: of the products; nothing counts as computed then.
        """
        counted = not context.is_inference()
        if counted and self._seen is not None and context is self._seen[0] and context._version == self._seen[1]:
            return
        self._seen = None  # what fails on the way leaves keys and values of two contexts
        self._kind = tuple(context.shape), context.dtype, context.device
        if self._kind not in self._filled:
            self._filled[self._kind] = self._recorded(context, record)
        fixed, fill = self._filled[self._kind]
        fixed.copy_(context)
        made = fill()
        self._held = {id(module): list(made[2 * i : 2 * i + 2]) for i, module in enumerate(self.attentions)}
        self._seen = (context, context._version) if counted else None

    def _recorded(self, context: Tensor, record: Callable[[Fill], Fill]) -> tuple[Tensor, Fill]:
        """Memory for contexts of this kind, which can be written whether or not inference mode is on, and its replay."""
        with torch.inference_mode(False):
            fixed = torch.empty_like(context)
        fixed.copy_(context)

        def fill() -> tuple[Tensor, ...]:
            """Keys and values of all modules; those of a joint product are parts of its rows, which kernels would copy."""
            return tuple(t.contiguous() for module in self.attentions for t in self.project(module, fixed))

        return fixed, record(fill)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """While it lasts, attention modules take what `update` left."""
        self._reading = True
        try:
            yield
        finally:
            self._reading = False

    def held(self, module: Any, context: Tensor) -> list[Tensor] | None:
        """Key and value of a module as `update` left them; None where they must be computed, as for another shape."""
        if not self._reading or self._kind is None or tuple(context.shape) != self._kind[0]:
            return None
        return self._held.get(id(module))
