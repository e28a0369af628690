"""One writer at a time in a folder."""

from __future__ import annotations

import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cachequant.errors import UserError
from cachequant.storage import make_folder

NAME = ".lock"


@contextmanager
def writer_lock(folder: Path) -> Iterator[None]:
    """Hold `folder` for writing; the system lets go of it however this process ends, kill -9 included.

    Raises:
        UserError: another process holds it, or the folder is not writable.
    """
    make_folder(folder)
    path = folder / NAME
    try:
        handle = open(path, "a+", encoding="utf-8")  # noqa: SIM115  # closed below, after the body
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose a writable folder") from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            holder = handle.read().strip() or "another process"
            raise UserError(
                f"{folder} is being written by {holder}, expected one writer at a time: wait for it or choose another folder"
            ) from None
        except OSError as error:
            raise UserError(
                f"cannot lock {path}: {error.strerror}; choose a folder on a file system with locks"
            ) from None
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {platform.node()}")
        handle.flush()
        yield
