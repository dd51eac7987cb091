"""A note on a downloaded blob's file that its checksum was computed, so that not every process does so again.

Kept with the file, in an extended attribute: whoever replaces or removes the file takes the note away. It holds
until the host is started again, as a power cut may lose what was written, and only while the file is what it was, by
inode, size and time. Where it cannot be kept, each process computes the checksum for itself.
"""

from __future__ import annotations

import os
import stat

from dask_zbig.tempfiles import BOOT

__all__ = ["is_noted", "note"]

_NAME = "user.zbig.checked"
#: ZEO passes a file's time through a float whenever it uses the file.
_ROUNDING = 1000


def is_noted(fd: int, checksum: int) -> bool:
    """Whether a process has found the file to have `checksum`, and it is what it was."""
    try:
        boot, inode, size, time, digest = os.getxattr(fd, _NAME).split()
        found = os.fstat(fd)
        return (boot, int(inode), int(size), int(digest, 16)) == (
            BOOT.encode(),
            found.st_ino,
            found.st_size,
            checksum,
        ) and abs(int(time) - found.st_mtime_ns) <= _ROUNDING
    except (OSError, ValueError):
        return False


def note(fd: int, before: os.stat_result, checksum: int) -> bool:
    """Note that the file, which was as `before` when one began to read it, has `checksum`; return whether one could."""
    text = f"{BOOT} {before.st_ino} {before.st_size} {before.st_mtime_ns} {checksum:016x}".encode()
    try:
        try:
            os.setxattr(fd, _NAME, text)
        except PermissionError:  # its mode is what forbids it: ZEO's are 0400
            mode = stat.S_IMODE(before.st_mode)
            os.fchmod(fd, mode | stat.S_IWUSR)
            try:
                os.setxattr(fd, _NAME, text)
            finally:
                os.fchmod(fd, mode)
    except OSError:  # a file system without attributes; a file of somebody else
        return False
    return True
