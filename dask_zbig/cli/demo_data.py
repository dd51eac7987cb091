"""The demo's input: the land mask of the package ``global-land-mask``, read as a stream.

It is one boolean for each 1/120 degree of the Earth, True where there is water, in a compressed ``.npz`` file of
2.4 MB that is 890 MiB when expanded. Importing the package expands all of it, so only its file is used, and that
one piece at a time.
"""

from __future__ import annotations

import importlib.util
import math
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import click
import numpy as np
import numpy.typing as npt

__all__ = ["CELL", "LandMask", "find_mask", "open_mask"]

CELL = 30  # the map has a cell for 30 x 30 of the mask's: 1/4 degree
BANDS = 18  # of latitude, 10 degrees each
_FILE = "globe_combined_mask_compressed.npz"


@dataclass(frozen=True, slots=True)
class LandMask:
    """A mask file; the first row is the northernmost. Opens the file each time it is read."""

    path: str
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes of the expanded mask."""
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """Rows of a piece: 5 degrees of latitude."""
        return self.shape[0] // (2 * BANDS)

    @property
    def grid(self) -> tuple[int, int]:
        """The shape of the map."""
        return self.shape[0] // CELL, self.shape[1] // CELL

    def latitudes(self) -> npt.NDArray[np.float64]:
        """Degrees north, by row."""
        with np.load(self.path) as members:
            return np.asarray(members["lat"], "f8")

    def pieces(self) -> Iterator[tuple[int, npt.NDArray[np.bool_]]]:
        """Expand the mask piece by piece: the first row's number, and `rows` rows."""
        size = self.rows * self.shape[1]
        with _expanded(self.path) as (stream, _):
            for first in range(0, self.shape[0], self.rows):
                data = stream.read(size)
                if len(data) != size:
                    raise click.ClickException(f"{self.path}: the mask ends early, at row {first}")
                yield first, np.frombuffer(data, np.bool_).reshape(self.rows, self.shape[1])


@contextmanager
def _expanded(path: str) -> Iterator[tuple[Any, tuple[int, int]]]:
    """The mask's bytes as a stream, and its shape."""
    with zipfile.ZipFile(path) as archive, archive.open("mask.npy") as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
        if len(shape) != 2 or fortran or dtype != np.bool_:
            raise ValueError(f"the mask is {dtype} {shape}, not rows of booleans")
        yield stream, (shape[0], shape[1])


def open_mask(path: str) -> LandMask:
    """Look at a mask file's header.

    Raises
    ------
    click.ClickException
        It is not such a file.
    """
    try:
        with _expanded(path) as (_, shape):
            mask = LandMask(path, shape)
        if shape[0] % (2 * BANDS * CELL) or shape[1] % CELL:
            raise ValueError(f"its shape {shape} is no multiple of ({2 * BANDS * CELL}, {CELL})")
        latitudes = mask.latitudes()
        if latitudes.shape != shape[:1] or not (np.diff(latitudes) < 0).all():
            raise ValueError("its rows do not go from north to south")
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise click.ClickException(f"{path} is not a land mask: {error}") from error
    return mask


def find_mask() -> LandMask:
    """The mask of the installed package, which is not imported.

    Raises
    ------
    click.ClickException
        What the demo needs is not installed.
    """
    found = importlib.util.find_spec("global_land_mask")
    if found is None or found.origin is None or importlib.util.find_spec("PIL") is None:
        raise click.ClickException("the demo needs some more packages: pip install 'dask_zbig[demo]'")
    return open_mask(os.path.join(os.path.dirname(found.origin), _FILE))
