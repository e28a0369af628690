"""Original YAML configurations: read, and every value that is used checked."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from cachequant.config import read_yaml, repository_folder
from cachequant.errors import UserError


def original_settings(family: str, path: Path | None) -> dict[str, Any]:
    """The original configuration as a plain dictionary; without a path, that of the released checkpoint.

    Raises:
        UserError: no such file, or not YAML.
    """
    from omegaconf import OmegaConf

    found = path or repository_folder() / "configs" / "original" / f"{family}.yaml"
    settings = OmegaConf.to_container(read_yaml(found), resolve=True)
    assert isinstance(settings, dict)
    return {str(k): v for k, v in settings.items()}


def need(settings: Mapping[str, Any], key: str, where: str = "") -> Any:
    """The value under a dotted key.

    Raises:
        UserError: it is not there.
    """
    value: Any = settings
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            name = f"{where}.{key}" if where else key
            raise UserError(f"the original configuration lacks {name}: give the YAML that belongs to this checkpoint")
        value = value[part]
    return value


def at_most(settings: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Refuse options that the conversion would have to respect but does not know.

    Raises:
        UserError: names the first.
    """
    for key in settings:
        if key not in known:
            raise UserError(f"the original configuration has {where}.{key}, which this conversion does not know")
