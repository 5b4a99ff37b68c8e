"""Writing a file whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from .errors import UserError


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Write text so that a reader sees the old file or the new one, and nothing between.

    Raises:
        OSError: it cannot be written; names this file, and not the one that is made first.
    """
    target = Path(path)
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from None
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide the file from a server's user
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def check_folder(*paths: Path) -> None:
    """Raise UserError for a file that cannot be written where it is asked for: before the work."""
    for path in paths:
        if not path.absolute().parent.is_dir():
            raise UserError(f"{path}: the folder {path.absolute().parent} does not exist")
        if path.is_dir():
            raise UserError(f"{path} is a folder; give the name of a file")
