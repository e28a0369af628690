"""What mutations put where something else was expected."""

from __future__ import annotations

import random
from typing import Any

PATHS = (
    "../../escape", "/", "/etc/passwd", "/proc/self/mem", "/dev/zero", "/dev/full", "..", ".", "", "a/b", "a\0b", "~",
    "x" * 5000, "nul/../../../tmp/escape", "https://example.invalid/x", "/proc/1/root", "-", "\ud7ff\n", "C:\\x", "$HOME",
)  # fmt: skip
NUMBERS = (
    0, -1, 1, 2, 3, 7, 255, 256, 999, 1001, 2**31, 2**63, 2**64, 2**70, -(2**63), 10**30, 0.5, -0.5, 1e-320, 1e308, 1e400,
    float("nan"), float("-inf"),
)  # fmt: skip
OTHERS: tuple[Any, ...] = (
    None,
    True,
    False,
    "",
    "null",
    "x",
    "0",
    [],
    {},
    [[]],
    [1, 2],
    {"a": {"b": 1}},
    ["a"],
    "é" * 9,
)


def hostile(draw: random.Random) -> Any:
    """One value of any kind."""
    return draw.choice(draw.choice((PATHS, NUMBERS, OTHERS)))


def places(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of keys to everything inside a nested value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [prefix] if prefix else []
    for key, item in inner:
        found += places(item, (*prefix, key))
    return found


def mutate_tree(draw: random.Random, value: Any) -> str:
    """Change one place of a nested value: what was done."""
    place = draw.choice(places(value))
    owner = value
    for key in place[:-1]:
        owner = owner[key]
    key, kind = place[-1], draw.choice(("value", "value", "value", "rename", "drop", "wrap", "nest"))
    if kind == "value":
        owner[key] = hostile(draw)
    elif kind == "drop":
        del owner[key]
    elif kind == "rename" and isinstance(owner, dict):
        owner[draw.choice((f"{key}s", f"{key}"[:-1] or "_", "", "../x", f"{key}.{key}", f" {key}", "__class__"))] = (
            owner.pop(key)
        )
    elif kind == "nest":
        owner[key] = deep(draw.choice((3, 100)))
    else:
        owner[key] = [owner[key]] * draw.choice((1, 2, 1000))
    return f"{kind} {'.'.join(map(str, place))}"


def deep(levels: int) -> Any:
    """Lists in lists."""
    made: Any = 1
    for _ in range(levels):
        made = [made]
    return made


def mutate_bytes(draw: random.Random, content: bytes) -> tuple[bytes, str]:
    """Damage some bytes: the new content, and what was done."""
    kind = draw.choice(("cut", "cut", "flip", "flip", "flip", "insert", "remove", "repeat"))
    start = draw.randrange(len(content) + 1)
    end = min(len(content), start + draw.randrange(1, 40))
    if kind == "cut":
        return content[:start], f"cut at {start}"
    if kind == "flip":
        damaged = bytearray(content)
        for _ in range(draw.choice((1, 1, 3, 16))):
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        return bytes(damaged), "bits flipped"
    if kind == "insert":
        return content[:start] + draw.randbytes(draw.randrange(1, 9)) + content[start:], f"bytes inserted at {start}"
    if kind == "remove":
        return content[:start] + content[end:], f"bytes removed at {start}"
    return content[:end] + content[start:], f"bytes repeated at {start}"
