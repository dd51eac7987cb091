"""Files in a blob directory that belong to no transaction: what ZODB leaves when a client or a server is killed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from ZODB.blob import FilesystemHelper
from ZODB.POSException import POSKeyError

__all__ = ["orphans"]

#: In the directory of uncommitted blobs: new ones, savepoints, copies, what a server receives.
_UNCOMMITTED = re.compile(r"BUC.+|savepoints.+|CTFT.+\.tmp|tmp[a-z0-9_]{8}")
#: In a blob's own directory, on the way to its place. They begin with the serial that it had: of a new one, "0x00".
_MOVING = re.compile(r"0x(00|[0-9a-f]{16}).{8}\.tmp-?")


def orphans(storage: Any, temporary: str | None) -> Iterator[str]:
    """The paths of files that are garbage, unless a transaction is at work with them: see how old they are.

    Parameters
    ----------
    storage
        A FileStorage, or a ZEO client. Of another storage only the first kind is looked for.
    temporary
        Its directory of uncommitted blobs.

    Notes
    -----
    Asks the storage for every committed blob.
    """
    if temporary is not None:
        yield from (path for path in _paths(temporary) if _UNCOMMITTED.fullmatch(os.path.basename(path)))
    helper = getattr(storage, "fshelper", None)
    if not isinstance(helper, FilesystemHelper) or not getattr(storage, "shared_blob_dir", True):
        return  # it has no blobs, or this is a client's own cache
    for oid, directory in helper.listOIDs():
        for path in _paths(directory):
            if _MOVING.fullmatch(os.path.basename(path)) or _was_never_committed(storage, helper, oid, path):
                yield path


def _paths(directory: str) -> list[str]:
    try:
        return [os.path.join(directory, name) for name in sorted(os.listdir(directory))]
    except FileNotFoundError:
        return []


def _was_never_committed(storage: Any, helper: Any, oid: bytes, path: str) -> bool:
    _, tid = helper.splitBlobFilename(path)
    if tid is None:
        return False
    try:
        storage.loadSerial(oid, tid)
    except POSKeyError:
        return True
    return False
