"""Which layers keep more bits, under a budget of bytes. Ours, not in the paper."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """One way to store a layer's weights.

    Attributes:
        bits: of its grid.
        bytes: as stored.
        error: what it does to the sample, in any unit that all layers share.
    """

    bits: int
    bytes: int
    error: float


def choose_bits(options: Mapping[str, tuple[Option, Option]], spare: float) -> dict[str, int]:
    """Bits of every layer: the cheap option of each, and the dear one where it saves most error per byte.

    Promotions are taken in the order of their saving per byte, each where it still fits: the greedy solution of the
    knapsack. Of all choices with so many bytes to spare the best has less error by at most what the bytes that are left at
    the first promotion that does not fit would save at that one's rate (Dantzig 1957): by less than that promotion.

    Args:
        options: layer -> (cheap, dear).
        spare: bytes that all promotions together may add.
    """
    bits = {name: cheap.bits for name, (cheap, _) in options.items()}

    def saving(name: str) -> float:
        cheap, dear = options[name]
        return (cheap.error - dear.error) / max(1, dear.bytes - cheap.bytes)

    for name in sorted(options, key=saving, reverse=True):
        cheap, dear = options[name]
        if cheap.error > dear.error and dear.bytes - cheap.bytes <= spare:
            bits[name] = dear.bits
            spare -= dear.bytes - cheap.bytes
    return bits
