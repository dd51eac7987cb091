"""The demo's check: a fresh process reads the database and compares it with NumPy's own work on the input.

What is expected comes from the input file, by plain NumPy, a piece at a time; nothing of it was in our arrays.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click
import numpy as np
import transaction

import dask_zbig as dz
from dask_zbig.cli.demo_data import BANDS, CELL, LandMask
from dask_zbig.signals import ctrl_c_not_inherited, ctrl_c_postponed

__all__ = ["Differences", "check"]


@dataclass(frozen=True, slots=True)
class Differences:
    """Elements that are not what they should be, by array; and the largest error of the fractions."""

    mask: int
    land: int
    land_fraction: int
    answer: float

    @property
    def none(self) -> bool:
        """Whether all is right; sums may differ in their last digits, as they were added in another order."""
        return self.mask + self.land + self.land_fraction == 0 and self.answer < 1e-12


def check(uri: str, source: LandMask, progress: Callable[[int, int], None]) -> Differences:
    """Compare, in a new interpreter with a connection of its own.

    Raises
    ------
    click.ClickException
        That process failed.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(uri, source, there), daemon=True)
    try:
        with ctrl_c_postponed(), ctrl_c_not_inherited():  # when it has been started, we have it to end it
            process.start()
        there.close()
        while True:
            try:
                message = here.recv()
            except EOFError:
                process.join()
                raise click.ClickException(f"the checking process failed, exit code {process.exitcode}") from None
            if isinstance(message, Differences):
                return message
            progress(message, source.nbytes)
    finally:
        if process.pid is not None:
            process.terminate()
            process.join()
        here.close()


def _run(uri: str, source: LandMask, pipe: Any) -> None:
    db = dz.open(uri)
    connection = db.open()

    def progress(done: int) -> None:
        transaction.abort()  # between transactions no page of an array stays in our memory
        pipe.send(done)

    try:
        pipe.send(compare(connection.root(), source, progress))
    finally:
        connection.close()
        db.close()


def compare(root: Any, source: LandMask, progress: Callable[[int], None]) -> Differences:
    """What `check` does, in this process."""
    weights = np.cos(np.radians(source.latitudes()))
    land_by_row = np.empty(source.shape[0])
    wrong = {"mask": 0, "land": 0, "land_fraction": 0}
    for first, water in source.pieces():
        land = np.logical_not(water)
        rows = slice(first, first + len(water))
        cells = slice(first // CELL, rows.stop // CELL)
        per_cell = land.reshape(len(land) // CELL, CELL, -1, CELL).mean(axis=(1, 3)).astype("f4")
        for name, where, expected in (
            ("mask", rows, water),
            ("land", rows, land),
            ("land_fraction", cells, per_cell),
        ):
            wrong[name] += int(np.count_nonzero(root[name][where] != expected))
        land_by_row[rows] = land.mean(axis=1)
        progress(rows.stop * source.shape[1])
    earth = np.average(land_by_row, weights=weights)
    bands = np.average(land_by_row.reshape(BANDS, -1), weights=weights.reshape(BANDS, -1), axis=1)
    answer = root["answer"]
    return Differences(**wrong, answer=float(max(abs(answer["earth"] - earth), *abs(answer["bands"] - bands))))
