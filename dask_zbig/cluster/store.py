"""What a worker does to store a chunk: write it to segments, stage them, and say which bytes they are."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dask_zbig.cluster.staging import Job, StagedSegment, commit_entry
from dask_zbig.cluster.worker import blob_directory, persevere
from dask_zbig.config import get
from dask_zbig.errors import DTypeError, ScratchError, ShapeError
from dask_zbig.memory._native import BLOCK, PAGE
from dask_zbig.segmentwriter import add_blobs, seal, store_inline
from dask_zbig.storage import extents as ex
from dask_zbig.storage.segment import SegmentRef
from dask_zbig.storage.sources import FileSource
from dask_zbig.tempfiles import Hold, new_name

__all__ = ["Manifest", "Place", "layout", "run_size", "runs_of", "stage", "stage_block"]

INLINE_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Place:
    """Where a chunk goes: strided bytes of the file of the array number `target`."""

    target: int
    position: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype[Any]

    def part(self, slices: Sequence[slice]) -> Place:
        """The place of a part of it."""
        position = self.position + sum(i.start * s for i, s in zip(slices, self.strides, strict=True))
        shape = tuple(i.stop - i.start for i in slices)
        return Place(self.target, position, shape, self.strides, self.dtype)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a task staged: extents (as bytes) of the array number `target` in the segments."""

    target: int
    extents: bytes
    segments: tuple[StagedSegment, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that were staged."""
        rows = np.frombuffer(self.extents, ex.EXTENT)
        return int((rows["stop"] - rows["start"]).sum())


def runs_of(
    shape: Sequence[int], position: int, strides: Sequence[int], itemsize: int
) -> tuple[npt.NDArray[np.int64], int, tuple[int, ...], tuple[int, ...]]:
    """The contiguous runs of bytes that a strided block covers.

    Returns
    -------
    starts : ndarray of int64
        Position of each run, ascending.
    size : int
        Bytes of each.
    axes : tuple of int
        The order of axes in which a block must be laid out (in C order) for its bytes to be those of the runs,
        one after the other.
    flipped : tuple of int
        The axes, as numbered in the block, that must be reversed first.
    """
    flipped = tuple(i for i, s in enumerate(strides) if s < 0)
    position += sum((shape[i] - 1) * strides[i] for i in flipped)
    axes, outer, size = layout(shape, strides, itemsize)
    starts = np.array([position], np.int64)
    for axis in outer:
        steps = np.arange(shape[axis], dtype=np.int64) * abs(strides[axis])
        starts = (starts[:, None] + steps[None, :]).ravel()
    return starts, size, axes, flipped


def layout(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> tuple[tuple[int, ...], list[int], int]:
    """The axes from the widest step to the narrowest; those of them that part runs; the bytes of a run."""
    axes = tuple(sorted(range(len(shape)), key=lambda i: -abs(strides[i]) if shape[i] > 1 else -(1 << 62)))
    outer, size = list(axes), itemsize
    while outer and (shape[outer[-1]] == 1 or abs(strides[outer[-1]]) == size):
        size *= shape[outer.pop()]
    return axes, outer, size


def run_size(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> int:
    """Bytes of the contiguous runs that a strided block covers; see `runs_of`."""
    return layout(shape, strides, itemsize)[2]


def stage_block(block: Any, slices: Sequence[slice], whole: Place, job: Job) -> npt.NDArray[Any]:
    """A task's work: `stage` what `slices` cut out of `whole`. For `map_blocks`, an array with the manifest."""
    out = np.empty((1,) * len(slices), object)
    out[(0,) * len(slices)] = stage(block, whole.part(slices), job)
    return out


def stage(block: Any, place: Place, job: Job) -> Manifest:
    """Store `block`, in this process's own transaction, so that nothing but `job` refers to it. Runs in a task.

    Raises
    ------
    ShapeError, DTypeError
        If `block` is not what its Dask array said it would be.
    ScratchError
        If the disk is full.
    DatabaseUnavailableError, PublishError
        If this process cannot get at the database, or the job is gone.
    """
    data = np.asarray(block)
    if data.shape != place.shape:
        raise ShapeError(
            f"a task computed a block of shape {data.shape} where its Dask array says {place.shape}: "
            f"tell map_blocks the right chunks"
        )
    if data.dtype != place.dtype:
        if not np.can_cast(data.dtype, place.dtype, "same_kind"):
            raise DTypeError(
                f"a task computed a block of {data.dtype}, which is not castable to {place.dtype} by "
                f"'same_kind': tell map_blocks the right dtype, or use astype"
            )
        data = data.astype(place.dtype)
    if data.size == 0:
        return Manifest(place.target, b"", ())
    starts, size, axes, flipped = runs_of(data.shape, place.position, place.strides, place.dtype.itemsize)
    data = np.flip(data, flipped) if flipped else data
    flat = np.ascontiguousarray(data.transpose(axes)).reshape(-1).view(np.uint8)

    def attempt() -> Manifest:
        directory = blob_directory(job.location)
        if directory is None or len(flat) <= get("inline-limit"):
            return _stage_inline(flat, starts, size, place, job)
        return _stage_blob(flat, starts, size, place, job, directory)

    # A task that fails costs the whole computation. (If it is unknown whether something was staged: never mind.)
    return persevere(job.location, attempt)


def _stage_inline(
    flat: npt.NDArray[np.uint8], starts: npt.NDArray[np.int64], size: int, place: Place, job: Job
) -> Manifest:
    pieces = [flat[i : i + INLINE_PIECE].tobytes() for i in range(0, len(flat), INLINE_PIECE)]

    def make(connection: Any) -> list[SegmentRef]:
        return [store_inline(None, connection, piece) for piece in pieces]

    staged = commit_entry(job, make)
    rows = []
    for k, start in enumerate(starts.tolist()):
        at = k * size
        while at < (k + 1) * size:  # a run may lie in several pieces
            number, offset = divmod(at, INLINE_PIECE)
            n = min((k + 1) * size - at, INLINE_PIECE - offset)
            lo = start + (at - k * size)
            rows.append((lo, lo + n, number, offset))
            at += n
    return Manifest(place.target, ex.make(rows).tobytes(), tuple(staged))


def _stage_blob(
    flat: npt.NDArray[np.uint8],
    starts: npt.NDArray[np.int64],
    size: int,
    place: Place,
    job: Job,
    directory: str,
) -> Manifest:
    # At the same offset modulo a page as in the array: then whole pages can be mapped. Modulo a block, where the
    # hole that this makes in the file is small beside the data: then huge ones can.
    pad = int(starts[0]) % (BLOCK if len(starts) == 1 and len(flat) >= 4 * BLOCK else PAGE)
    path = os.path.join(directory, new_name())
    with Hold(directory):
        try:
            try:
                _write(path, flat, pad)
            except OSError as e:
                raise ScratchError(e.errno, f"cannot write {len(flat)} bytes to {path!r}: {e.strerror}") from e
            source = FileSource(path)
            sums = seal([source])
            staged = commit_entry(job, lambda connection: add_blobs(None, connection, [source], sums))
        finally:
            if os.path.exists(path):
                os.unlink(path)
    rows = np.zeros(len(starts), ex.EXTENT)
    rows["start"] = starts
    rows["stop"] = starts + size
    rows["offset"] = pad + np.arange(len(starts), dtype=np.int64) * size
    return Manifest(place.target, ex.coalesce(rows).tobytes(), tuple(staged))


def _write(path: str, flat: npt.NDArray[np.uint8], pad: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        at = 0
        with memoryview(flat.data) as view:
            while at < len(flat):
                stop = min(len(flat), at + BLOCK - (pad + at) % BLOCK)
                at += os.pwrite(fd, view[at:stop], pad + at)
    finally:
        os.close(fd)
