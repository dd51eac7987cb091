"""What the demo computes, and the only part of it that a user would write: everything else is presentation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dask
import numpy as np
import numpy.typing as npt
import transaction
from persistent.mapping import PersistentMapping

import dask_zbig as dz
from dask_zbig.cli.demo_data import BANDS, CELL, LandMask

__all__ = ["Answer", "import_mask", "land_fractions", "save_land"]

#: The Earth's land fraction, and that of each band of latitude from north to south.
Answer = tuple[float, npt.NDArray[np.float64]]


def import_mask(connection: Any, source: LandMask, progress: Callable[[int, int], None]) -> None:
    """Fill an array from the stream, in one transaction however large it is."""
    root = connection.root()
    root["mask"] = mask = dz.ZBigArray(source.shape, bool)
    root["land"] = dz.ZBigArray(source.shape, bool)
    root["land_fraction"] = dz.ZBigArray(source.grid, "f4")
    root["answer"] = PersistentMapping()
    for first, piece in source.pieces():
        mask[first : first + len(piece)] = piece
        progress((first + len(piece)) * source.shape[1], source.nbytes)
    transaction.commit()


def land_fractions(connection: Any, source: LandMask) -> Answer:
    """Weigh each row of the mask by the cosine of its latitude. The workers read the array, we get the numbers."""
    water = dz.from_zbigarray(connection.root()["mask"], chunks=(source.rows, -1))
    weights = np.cos(np.radians(source.latitudes()))
    land_by_row = (~water).mean(axis=1) * weights
    earth = land_by_row.sum() / weights.sum()
    bands = land_by_row.reshape(BANDS, -1).sum(axis=1) / weights.reshape(BANDS, -1).sum(axis=1)
    fraction, by_band = dask.compute(earth, bands)
    return float(fraction), by_band


def save_land(connection: Any, source: LandMask, answer: Answer) -> dz.SaveResult:
    """Write two arrays by the workers, and the numbers from here: all in one transaction, or nothing."""
    root = connection.root()
    water = dz.from_zbigarray(root["mask"], chunks=(source.rows, -1))
    cells = (source.rows // CELL, source.grid[1])
    with dz.CommitCoordinator(connection) as save:
        save.store(~water, root["land"])
        save.store(water.map_blocks(_land_by_cell, dtype="f4", chunks=cells), root["land_fraction"])
        root["answer"].update(earth=answer[0], bands=answer[1])
    assert save.result is not None
    return save.result


def _land_by_cell(water: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
    rows, columns = water.shape
    by_line = np.asarray(water).view("u1").reshape(rows // CELL, CELL, columns).sum(axis=1, dtype="u1")
    wet = by_line.reshape(rows // CELL, columns // CELL, CELL).sum(axis=2, dtype="u2")
    return np.asarray(1 - wet / CELL**2, "f4")
