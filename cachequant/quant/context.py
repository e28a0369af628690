"""Keys and values of cross-attention, which the prompt alone determines: computed once a prompt, not at every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Project = Callable[[Any, Tensor], list[Tensor]]
"""Key and value [B, M, C] of an attention module from a context [B, M, E]."""


class ContextOperands:
    """Holds key and value of every cross-attention whose integers and epilogues are the same at all steps.

    A captured step reads them at fixed addresses; `update` fills these whenever the context is another tensor, or was
    written to, since the last call.

    Args:
        attentions: modules whose `to_k` and `to_v` are deployed and constant.
        project: computes their key and value.
    """

    def __init__(self, attentions: list[Any], project: Project) -> None:
        self.attentions, self.project = attentions, project
        self._seen: tuple[Tensor, int] | None = None
        self._held: dict[tuple[int, tuple[int, ...]], list[Tensor]] = {}
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

    def update(self, context: Tensor) -> None:
        """Compute key and value of [B, M, E] anew unless it is what the last call was given.

        Tensors of inference mode do not count their changes, and are computed every time.
        """
        counted = not context.is_inference()
        if counted and self._seen is not None and context is self._seen[0] and context._version == self._seen[1]:
            return
        for module in self.attentions:
            made = self.project(module, context)
            held = self._held.get(self._key(module, context))
            if held is None or any(old.dtype != new.dtype for old, new in zip(held, made, strict=True)):
                self._held[self._key(module, context)] = [t.clone() for t in made]
                continue
            for old, new in zip(held, made, strict=True):
                old.copy_(new)
        self._seen = (context, context._version) if counted else None

    @contextmanager
    def reading(self) -> Iterator[None]:
        """While it lasts, attention modules take what `update` left."""
        self._reading = True
        try:
            yield
        finally:
            self._reading = False

    def held(self, module: Any, context: Tensor) -> list[Tensor] | None:
        """Key and value of a module for a context of this shape; None where they must be computed."""
        return self._held.get(self._key(module, context)) if self._reading else None

    @staticmethod
    def _key(module: Any, context: Tensor) -> tuple[int, tuple[int, ...]]:
        return id(module), tuple(context.shape)
