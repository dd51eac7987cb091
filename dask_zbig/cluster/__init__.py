"""What Dask sees: arrays to read at one snapshot, arrays to write in one save.

Importing Dask's arrays and `distributed` takes longer than all the rest, and many programs need neither. So here is
only what must be known before anybody uses them: how pickle and Dask's tokens take an array.
"""

from __future__ import annotations

import copyreg
import importlib
from typing import Any

from dask.base import normalize_token

from dask_zbig.array.zbigarray import ZBigArray


def _by_reference(array: ZBigArray) -> Any:
    return importlib.import_module("dask_zbig.cluster.snapshot").by_reference(array)


def _token(array: ZBigArray) -> Any:
    return importlib.import_module("dask_zbig.cluster.snapshot").token(array)


copyreg.pickle(ZBigArray, _by_reference)
normalize_token.register(ZBigArray, _token)
