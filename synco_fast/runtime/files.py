"""Files of a run: atomic writes, JSON, and checks of output paths."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from synco_fast.data.files import atomic_write
from synco_fast.runtime.errors import ConfigError, UserError

__all__ = [
    "UNWRITABLE",
    "atomic_write",
    "check_text",
    "check_writable",
    "named_path",
    "read_json",
    "write_json",
    "write_text",
]

#: What a system says that has no room left, or lets this user write no longer.
UNWRITABLE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO})


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write indented JSON, atomically."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no file.

    Raises:
        UserError: The file cannot be read, is not JSON, or does not hold an object.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: found JSON that cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: found {type(found).__name__}, expected a JSON object")
    return found


def check_text(text: str, key: str = "") -> None:
    """Refuse a name whose bytes are no UTF-8, as on an old disk: no JSON, no plot and no export can hold it.

    Args:
        text: The name.
        key: What the message calls it.

    Raises:
        ConfigError: It is such a name.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{key}{': ' if key else ''}found {text!r}, a name that is not UTF-8, expected one that is, such as a "
            "link to it"
        ) from error


def named_path(name: str | Path, key: str = "") -> Path:
    """A file or folder as a user names it: ``~`` is the home folder, as in a shell.

    A shell leaves ``--out=~/run`` alone, and Python every path: a folder named ``~`` would come into being.

    Args:
        name: The name.
        key: What the message calls it.

    Raises:
        UserError: The name is empty or not UTF-8, or there is no such user.
    """
    check_text(str(name), key)
    if not str(name).strip():
        raise UserError(f"{key}{': ' if key else ''}found {name!r}, expected the name of a file or folder")
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise UserError(f"{key}{': ' if key else ''}found {str(name)!r}, whose user is not here") from error


def check_writable(path: Path, name: str, *, file: bool = False) -> None:
    """Refuse a file or folder that could not be written, before any long work starts; creates nothing.

    Args:
        path: A file or folder, existing or new.
        name: Its name in the message.
        file: Whether it must be a file.

    Raises:
        UserError: It is below a file, is not writable, or is a folder instead of a file or the reverse.
    """
    if file and path.is_dir():
        raise UserError(f"{name}: found a folder {path}, expected a file")
    above = path.absolute()
    while not os.path.lexists(above):
        above = above.parent
    if above != path.absolute() and not above.is_dir():
        raise UserError(f"{name}: found {path} below {above}, which is a file, expected a folder")
    if not file and not above.is_dir():
        raise UserError(f"{name}: found a file {path}, expected a folder")
    if not os.access(above, os.W_OK) or _is_virtual(above):
        raise UserError(f"{name}: found {path}, expected a place where this user can write ({above} is not)")


def _is_virtual(path: Path) -> bool:
    """Whether a path is on a virtual file system, which takes no files whatever its permissions."""
    return path.resolve().parts[:2] in (("/", "proc"), ("/", "sys"))
