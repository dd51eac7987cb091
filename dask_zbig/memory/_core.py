"""The compiled memory core."""

from __future__ import annotations

from dask_zbig.compiled import compiled

__all__ = ["ffi", "lib"]

ffi, lib = compiled("dask_zbig.memory._zbig")
