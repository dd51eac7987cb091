"""Reading what was staged, also before it is published: from the segments, without any array."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from dask.array import core
from dask.base import tokenize

from dask_zbig.cluster.save import Plan, StagedSave
from dask_zbig.cluster.store import Manifest, Place, layout
from dask_zbig.cluster.worker import writing
from dask_zbig.database import Location
from dask_zbig.storage import extents as ex
from dask_zbig.storage.reader import reader

__all__ = ["read_back"]


def read_back(staged: StagedSave, plan: Plan) -> core.Array:
    """A Dask array of what was staged, in the chunks in which it was."""
    name = f"zbig-stored-{tokenize(staged.job.id, plan.place.target)}"
    places = [plan.place.part(slices) for slices in core.slices_from_chunks(plan.chunks)]
    keys = core.product([name], *(range(len(c)) for c in plan.chunks))
    graph = {
        key: (_read, staged.job.location, manifest, place)
        for key, manifest, place in zip(keys, staged.manifests, places, strict=True)
    }
    return core.Array(graph, name, plan.chunks, dtype=plan.place.dtype)


def _read(location: Location, manifest: Manifest, place: Place) -> npt.NDArray[Any]:
    """A block, from its segments. Runs in a task."""
    rows = np.frombuffer(manifest.extents, ex.EXTENT)
    with writing(location) as connection:
        read = reader(connection.db())
        sources = [read.source(s.ref(connection)) for s in manifest.segments]
        flat = bytearray().join(sources[i].read(offset, b - a) for a, b, i, offset in rows.tolist())
    axes, _, _ = layout(place.shape, place.strides, place.dtype.itemsize)
    flipped = tuple(i for i, s in enumerate(place.strides) if s < 0)
    block = np.frombuffer(flat, place.dtype).reshape([place.shape[i] for i in axes]).transpose(np.argsort(axes))
    return np.flip(block, flipped)
