"""Transactional NumPy arrays bigger than RAM and disk, stored in ZODB and computed on by Dask."""

from dask_zbig.array.zbigarray import ZBigArray

__all__ = ["ZBigArray"]
