"""Who may read the files that are made: the user alone, or whoever may read the database.

The blob directory's mode decides. One that is made here is 0700; an administrator who gives it to a group, say 2750, or
2770 for clients that share it, gives all that will be in it. The umask has no say: blobs of another mode than their
database's would be too open, or of no use.
"""

from __future__ import annotations

import contextlib
import os
import stat

from ZODB.blob import FilesystemHelper as _FilesystemHelper

__all__ = ["FilesystemHelper", "follow", "make_directory"]


class FilesystemHelper(_FilesystemHelper):  # type: ignore[misc]  # ZODB ships no types
    """ZODB's, which knows where blobs lie, and here makes directories as the one that they all lie in.

    ZODB gives a blob's file the read permissions of its directory.
    """

    def getPathForOID(self, oid: bytes, create: bool = False) -> str:  # noqa: N802 - ZODB's name
        """Return an object's directory, and make it if wanted."""
        path = str(super().getPathForOID(oid))
        if create and not os.path.isdir(path):
            make_directory(path, stat.S_IMODE(os.stat(self.base_dir).st_mode))
        return path


def follow(helper: object) -> None:
    """Make a storage's helper one of ours, if it is ZODB's own."""
    if type(helper) is _FilesystemHelper:
        helper.__class__ = FilesystemHelper


def make_directory(path: str, mode: int = 0o700) -> None:
    """Make a directory, and those above it that are missing, of exactly this mode."""
    if os.path.isdir(path):
        return
    make_directory(os.path.dirname(path), mode)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
        os.chmod(path, mode)
