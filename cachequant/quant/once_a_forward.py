"""What several blocks read alike, computed by the first of them that runs."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

Made = TypeVar("Made")


class OnceAForward(Generic[Made]):
    """Computes when the first block of a forward asks; the others get the same.

    A block that asks again is of the next forward, even where its inputs are the same objects: a captured step has its
    inputs at fixed addresses, where their values change. Other objects are of another forward too.

    Args:
        make: computes from the inputs.
    """

    def __init__(self, make: Callable[..., Made]) -> None:
        self._make = make
        self._inputs: tuple[Any, ...] = ()
        self._made: Made | None = None
        self._asked: set[Hashable] = set()

    def of(self, block: Hashable, *inputs: Any) -> Made:
        """What `make` gives for the inputs of the forward that `block` runs in."""
        same = len(inputs) == len(self._inputs) and all(a is b for a, b in zip(inputs, self._inputs, strict=True))
        if self._made is None or not same or block in self._asked:
            self._made = None  # where computing fails, the next one tries again
            self._asked.clear()
            self._made, self._inputs = self._make(*inputs), inputs
        self._asked.add(block)
        return self._made
