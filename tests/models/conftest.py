"""Reference checkpoints of the original code."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.original_checkpoints import Golden


@pytest.fixture(scope="session")
def golden(golden_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    """Skipped where there are none."""
    return Golden(golden_folder, tmp_path_factory.mktemp("original"))
