"""The end of a ``Data.fs`` after a crash: where a transaction begins that was being written.

ZODB's own FileStorage copies such a tail to ``Data.fs.tr0`` and cuts it off, or refuses to open: if the power fails
while it writes, a disk may have the end of the transaction and not its beginning. Our FileStorage syncs all of a
transaction while it is marked as unfinished, and only then its mark as finished. So whatever is not marked, or has no
beginning, was promised to nobody.
"""

from __future__ import annotations

import struct
from typing import IO

from ZODB.FileStorage.format import TRANS_HDR, TRANS_HDR_LEN

__all__ = ["unfinished"]

_NOT_DONE = (b"c", b"\0")  # the mark, and what is there if the sector was never written
_LENGTH = 8  # bytes that repeat a transaction's length after it


def unfinished(file: IO[bytes], start: int) -> int | None:
    """Return where an unfinished transaction begins that is all the rest of the file; None if there is none.

    Parameters
    ----------
    file
        A Data.fs.
    start
        Where a transaction begins, or the file ends. What is before is taken for good.
    """
    size = file.seek(0, 2)
    while start < size:
        file.seek(start)
        header = file.read(TRANS_HDR_LEN)
        if len(header) < TRANS_HDR_LEN:
            return start
        _, length, status, *_ = struct.unpack(TRANS_HDR, header)
        if status in _NOT_DONE:
            return None if _ends_finished(file, start, size) else start
        if status not in b" up" or length < TRANS_HDR_LEN or start + length + _LENGTH > size:
            return None  # this is not of our doing
        start += length + _LENGTH
    return None


def _ends_finished(file: IO[bytes], start: int, size: int) -> bool:
    """Whether there is a finished transaction at the end: then it is damage that lies before it."""
    file.seek(size - _LENGTH)
    length = int.from_bytes(file.read(_LENGTH), "big")
    last = size - _LENGTH - length
    if length < TRANS_HDR_LEN or last <= start:
        return False
    file.seek(last)
    _, repeated, status, *_ = struct.unpack(TRANS_HDR, file.read(TRANS_HDR_LEN))
    return bool(repeated == length and status in b" up")
