"""Where the embedded miniatures live."""

from pathlib import Path

from cachequant.errors import UserError


def assets_folder() -> Path:
    """The `assets/` folder beside the package.

    Raises:
        UserError: the folder is absent.
    """
    folder = Path(__file__).resolve().parent.parent / "assets"
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; expected the repository's assets/: run from a full checkout")
    return folder
