"""Folders and hub models: where they lie, without the libraries' messages, and with one line when they cannot be had."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cachequant.errors import UserError


@contextmanager
def quiet() -> Iterator[None]:
    """Keep diffusers' and transformers' advice, retries and progress bars off the terminal."""
    import diffusers
    import transformers

    libraries = [library.utils.logging for library in (diffusers, transformers)]
    before = [(logger.get_verbosity(), logger.is_progress_bar_enabled()) for logger in libraries]
    for logger in libraries:
        logger.set_verbosity_error()
        logger.disable_progress_bar()
    try:
        yield
    finally:
        for logger, (verbosity, bars) in zip(libraries, before, strict=True):
            logger.set_verbosity(verbosity)
            if bars:
                logger.enable_progress_bar()


def hub_folder(name: str, title: str, patterns: list[str] | None = None, download: bool = True) -> Path:
    """The local copy of a hub model, downloaded first where that is possible.

    Args:
        name: owner/model.
        title: what messages call it.
        patterns: files that are wanted; None takes what a diffusers pipeline needs.
        download: False looks into the hub's cache only.

    Raises:
        UserError: it is neither in the cache nor within reach.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"no {title} {name}: there is no such folder or file, and a hub id reads owner/name")
    try:
        if patterns is None:
            from diffusers import DiffusionPipeline

            return Path(DiffusionPipeline.download(name, local_files_only=not download))
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=not download))
    except Exception:  # diffusers and the hub raise many kinds; each means that the model cannot be had
        raise UserError(
            f"no {title} {name}: there is no such folder, and the hub's model of that name is neither in the cache nor "
            f"within reach; run `hf download {name}` where there is a network, or give a local folder"
        ) from None
