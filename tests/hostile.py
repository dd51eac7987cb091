"""Reads arrays whose records were changed at random: what is read is right by a simple model, or an error of ours.

A program: ``python tests/hostile.py DIRECTORY SEED COUNT``. It prints each seed before it is used, so that a crash
names it, and at the end how many ended how.
"""

from __future__ import annotations

import collections
import io
import logging
import math
import os
import random
import struct
import sys
import zlib

import dask
import numpy as np
import transaction
import ZODB
from persistent import Persistent
from ZODB._compat import PersistentPickler
from ZODB.Connection import TransactionMetaData
from ZODB.DemoStorage import DemoStorage
from ZODB.utils import z64

import dask_zbig as dz
from dask_zbig.array.indexing import Geometry
from dask_zbig.array.zbigarray import _load
from dask_zbig.storage.filestorage import FileStorage
from dask_zbig.storage.format import LEAF_BYTES
from dask_zbig.storage.leafstate import LeafState
from dask_zbig.storage.records import read_record
from dask_zbig.storage.segment import InlineSegment
from dask_zbig.storage.tree import ExtentLeaf, ExtentNode, ZBigFile

SIZE = LEAF_BYTES + 8192
WINDOWS = [(0, 300_000), (LEAF_BYTES - 5000, SIZE)]
ROW = struct.Struct("<QQIQ")
SEGMENT = struct.Struct("<QQ")
NUMBERS = [0, 1, 2, 7, 4096, 2**31, 2**32 - 1, LEAF_BYTES - 1, LEAF_BYTES, LEAF_BYTES + 1, 2**63, 2**63 - 1, 2**64 - 1]


def make(path):
    """A database with an array of two leaves: a blob, inline segments, holes."""
    db = ZODB.DB(FileStorage(path))
    manager = transaction.TransactionManager()
    connection = db.open(manager)
    connection.root()["A"] = A = dz.ZBigArray((SIZE,), "u1")
    chance = np.random.default_rng(1)
    A[1000:201_000] = chance.integers(1, 256, 200_000, "u1")
    manager.commit()
    for lo, hi in [(3, 5), (10_000, 10_100), (70_000, 70_001), (LEAF_BYTES - 9, LEAF_BYTES + 11), (SIZE - 1, SIZE)]:
        A[lo:hi] = chance.integers(1, 256, hi - lo, "u1")
        manager.commit()
    connection.close()
    db.close()


# -- changes


def any_number(chance, near=()):
    base = chance.choice([*NUMBERS, *near, chance.randrange(2**64), chance.randrange(300_000)])
    return max(0, min(2**64 - 1, base + chance.choice([-1, 0, 0, 0, 1])))


def changed_rows(chance, packed, form, most=2):
    rows = [list(row) for row in form.iter_unpack(packed)]
    near = [n for row in rows for n in row]
    for _ in range(chance.randint(1, most)):
        what = chance.choice(["field", "field", "field", "swap", "twice", "drop", "new", "bytes"])
        if what == "new" or not rows:
            rows.insert(chance.randint(0, len(rows)), [any_number(chance, near) for _ in range(form.size // 7)])
        elif what == "field":
            row = chance.choice(rows)
            k = chance.randrange(len(row))
            row[k] = (
                any_number(chance, near) if chance.random() < 0.6 else max(0, row[k] + chance.choice([-2, -1, 1, 2]))
            )
        elif what == "swap":
            i, k = chance.randrange(len(rows)), chance.randrange(len(rows))
            rows[i], rows[k] = rows[k], rows[i]
        elif what == "twice":
            rows.insert(chance.randint(0, len(rows)), list(chance.choice(rows)))
        elif what == "drop":
            rows.pop(chance.randrange(len(rows)))
    fields = 4 if form is ROW else 2
    packed = b""
    for row in rows:
        row = (row + [0] * 4)[:fields]
        if form is ROW:
            row[2] &= 2**32 - 1
        packed += form.pack(*row)
    return packed[: -chance.randint(1, 9)] if chance.random() < 0.05 else packed


def as_rows(state):
    """A leaf's state as version 1 has it, of which single fields can be changed."""
    leaf = LeafState.unpack(ExtentLeaf(), state)
    table = b"".join(SEGMENT.pack(r.length, r.checksum) for r in leaf.refs)
    return (1, leaf.extents.tobytes(), table, state[2], leaf.move.to, leaf.move.rows.tobytes())


def changed_state(chance, state, objects):
    if len(state) == 3 and state[0] == 2 and chance.random() < 0.7:
        state = as_rows(state)
    state = list(state)
    what = chance.choice(["field"] * 8 + ["version", "drop", "more", "junk"])
    if what == "version":
        state[0] = chance.choice([3, 2, 0, -1, "1", None, True, 1.0])
    elif what == "drop":
        state.pop(chance.randrange(len(state)))
    elif what == "more":
        state.append(chance.choice([None, {}, {"_shape": (10**6,)}, 5]))
    elif what == "junk":
        state[chance.randrange(len(state))] = chance.choice([None, 5, b"", "x", (), [], {}, *objects])
    else:
        k = chance.randrange(1, len(state))
        value = state[k]
        if isinstance(value, bytes) and len(value) % ROW.size == 0 and value and k == 1:
            state[k] = changed_rows(chance, value, ROW)
        elif isinstance(value, bytes) and len(value) % SEGMENT.size == 0 and value:
            state[k] = changed_rows(chance, value, SEGMENT)
        elif isinstance(value, bytes):
            state[k] = bytes(chance.randrange(256) for _ in range(chance.choice([0, 1, 2, 4, 8, 32])))
        elif isinstance(value, tuple) and value and isinstance(value[0], int):
            state[k] = tuple(chance.choice([-1, 0, 1, 1000, SIZE, 2**62, 2**63]) for _ in range(chance.randint(0, 3)))
        elif isinstance(value, tuple):
            value = list(value)
            for _ in range(chance.randint(1, 2)):
                chance.choice([lambda: value.append(chance.choice(objects)), lambda: value and value.pop()])()
                chance.shuffle(value)
            state[k] = tuple(value)
        elif isinstance(value, int):
            state[k] = any_number(chance)
        elif isinstance(value, str):
            state[k] = chance.choice(
                ["|O", "<f8", "<u2", "|S3", "|V7", "C", "F", "A", "M8[ns]", [("a", "|O")], "T", ""]
            )
        else:
            state[k] = chance.choice([None, *objects])
    return tuple(state)


def dump(kind, state):
    """A record."""
    out = io.BytesIO()

    def persistent_id(obj):
        return (obj._p_oid, type(obj)) if isinstance(obj, Persistent) and obj._p_oid else None

    pickler = PersistentPickler(persistent_id, out, 3)
    pickler.dump(kind)
    pickler.dump(state)
    return out.getvalue()


CLASSES = {f"{c.__module__}.{c.__name__}": c for c in (dz.ZBigArray, ZBigFile, ExtentNode, ExtentLeaf, InlineSegment)}


def changed_record(chance, oid, record, objects):
    kind, state = read_record(oid, record)
    if chance.random() < 0.3:
        junk = bytearray(record)
        for _ in range(chance.choice([1, 1, 1, 2, 5])):
            junk[chance.randrange(len(junk))] ^= 1 << chance.randrange(8)
        return bytes(junk[: chance.randrange(len(junk))]) if chance.random() < 0.1 else bytes(junk)
    return dump(CLASSES[kind], changed_state(chance, state, objects))


# -- the model


class Wrong(Exception):
    """The database says nothing that makes sense."""


def sense(condition):
    if not condition:
        raise Wrong


def unpacked(table, count):
    """The extents of a packed table, and the lengths of its segments."""
    if not table and not count:
        return [], []
    sense(len(table) >= 17)
    leaf, n, k, _ = struct.unpack_from("<QIIB", table)
    try:
        columns = zlib.decompress(table[17 + 8 * (k > 0) + 8 * count :])
    except zlib.error:
        raise Wrong from None
    sense(len(columns) == 20 * n + 9 * count + 24 * k)

    def column(at, size, rows):
        planes = [columns[at + b * rows : at + (b + 1) * rows] for b in range(size)]
        return [int.from_bytes(row, "little") for row in zip(*planes, strict=True)] if rows else []

    gaps, sizes, codes, residues = (column(at * n, size, n) for at, size in ((0, 4), (4, 4), (8, 4), (12, 8)))
    lengths, follows = column(20 * n, 8, count), columns[20 * n + 8 * count :]
    rows, at, new, before = [], leaf * LEAF_BYTES, 0, {}
    for gap, size, code, residue in zip(gaps, sizes, codes, residues, strict=True):
        start, segment = at + gap, code - 1 if code else new
        new += code == 0
        sense(segment < count)
        offset = residue
        if segment in before:
            a, b, o = before[segment]
            offset = (residue + o + ((b - a) if follows[segment] else (start - a))) % 2**64
        at = start + size
        before[segment] = (start, at, offset)
        rows.append((start, at, segment, offset))
    return rows, lengths


class Model:
    """What an array is, by the format's description, written down once more and simply."""

    def __init__(self, load, blob):
        self._load = load
        self._blob = blob

    def record(self, ghost, kind):
        sense(isinstance(ghost, kind))
        try:
            data = self._load(ghost._p_oid)
        except KeyError:
            raise Wrong from None
        try:
            _, state = read_record(ghost._p_oid, data)
        except dz.FormatError:
            raise Wrong from None
        sense(isinstance(state, tuple) and state and type(state[0]) is int)
        if kind is ExtentLeaf and state[0] == 2:
            sense(len(state) == 3 and isinstance(state[1], bytes))
            return unpacked(state[1], len(state[2])), state[2]
        sense(state[0] == 1)
        if kind is ExtentLeaf:
            packed, table, segments, _, _ = state[1:]
            return (list(ROW.iter_unpack(packed)), [n for n, _ in SEGMENT.iter_unpack(table)]), segments
        return state[1:]

    def array(self, oid):
        ghost = ZBigFile.__new__(ZBigFile)
        ghost._p_oid = oid
        shape, descr, order, file, *_ = self.record(ghost, ZBigFile)
        dtype = np.lib.format.descr_to_dtype(descr)
        return tuple(shape), dtype, order, file

    def read(self, file, lo, hi):
        out = bytearray(hi - lo)
        depth, root, _, _ = self.record(file, ZBigFile)
        for index in range(lo // LEAF_BYTES, (hi - 1) // LEAF_BYTES + 1):
            leaf = root if root is None or depth else (root if index == 0 else None)
            for level in range(depth, 0, -1):
                if leaf is None:
                    break
                own, keys, children = self.record(leaf, ExtentNode)
                sense(own == level)
                table = dict(zip(struct.unpack(f"<{len(keys) // 2}H", keys), children, strict=True))
                leaf = table.get(index // 1024 ** (level - 1) % 1024)
            if leaf is not None:
                self.leaf(leaf, index, out, lo, hi)
        return bytes(out)

    def leaf(self, ghost, index, out, lo, hi):
        (rows, lengths), segments = self.record(ghost, ExtentLeaf)
        end = index * LEAF_BYTES
        sense(len(lengths) == len(segments))
        for start, stop, segment, offset in rows:
            sense(end <= start < stop <= (index + 1) * LEAF_BYTES)
            end = stop
            sense(segment < len(segments) and offset + stop - start <= lengths[segment])
            a, b = max(start, lo), min(stop, hi)
            if a < b:
                data = self.segment(segments[segment])
                sense(len(data) == lengths[segment])
                out[a - lo : b - lo] = data[offset + a - start : offset + b - start]

    def segment(self, ghost):
        if isinstance(ghost, InlineSegment):
            (data,) = self.record(ghost, InlineSegment)
            return data
        return self._blob(ghost._p_oid)


# -- one example


def example(chance, base, oids, blob):
    storage = DemoStorage(base=base, close_base_on_close=False)
    records = {oid: base.load(oid)[0] for oid in oids}
    objects = []
    for oid in oids:
        kind, _ = read_record(oid, records[oid])
        ghost = CLASSES[kind].__new__(CLASSES[kind])
        ghost._p_oid = oid
        objects.append(ghost)
    meta = TransactionMetaData()
    storage.tpc_begin(meta)
    for oid in chance.sample(oids, chance.choice([0, 1, 1, 1, 1, 2])):
        records[oid] = changed_record(chance, oid, records[oid], objects)
        storage.store(oid, base.load(oid)[1], records[oid], "", meta)
    storage.tpc_vote(meta)
    storage.tpc_finish(meta)

    db = ZODB.DB(storage)
    try:
        manager = transaction.TransactionManager()
        connection = db.open(manager)
        outcome = use(chance, connection, manager, Model(records.__getitem__, blob), oids[0])
        manager.abort()
        connection.close()
        report = dz.check(db)
        assert outcome != "error" or not report.sound, "check has missed it"
        return outcome
    finally:
        db.close()


def use(chance, connection, manager, model, oid):
    A = connection.root()["A"]
    outcome = "right"
    for lo, hi in WINDOWS:
        by_fault = chance.random() < 0.3
        try:
            _load(A)  # (to ask a ghost for a method is to load it in ZODB's own way)
            hi = min(hi, A.nbytes)
            view = A.view_at(Geometry(lo, (max(hi - lo, 0),), (1,), lo, max(hi, lo)), np.dtype("u1"))
            if not by_fault and lo < hi:
                A._open().prefetch(lo, hi)
            got = view.tobytes()
            for _ in range(20):
                str(_)  # what a fault raises comes at the next call
        except dz.ZBigError:
            manager.abort()
            outcome = "error"
            continue
        shape, dtype, order, file = model.array(oid)
        assert (A.shape, A.dtype, A.order) == (shape, dtype, order)
        assert all(n >= 0 for n in shape)
        assert not dtype.hasobject
        assert math.prod(shape) * dtype.itemsize < 2**63
        assert got == (model.read(file, lo, hi) if lo < hi else b""), f"wrong bytes in {lo}..{hi}"
    if outcome == "right" and A.nbytes > 20 and chance.random() < 0.5:
        A.view_at(Geometry(7, (9,), (1,), 7, 16), np.dtype("u1"))[:] = 77
        manager.commit()
        connection.cacheMinimize()
        assert A.view_at(Geometry(7, (9,), (1,), 7, 16), np.dtype("u1")).tobytes() == b"M" * 9
    return outcome


def main(directory, seed, count):
    logging.disable()  # ZODB logs each object that cannot be loaded
    dask.config.set({"zbig.load-timeout": 0.03})
    path = os.path.join(directory, "x.fs")
    if not os.path.exists(path):
        make(path)
    base = FileStorage(path, read_only=True)
    oids, others, more = [], {}, None
    while True:
        oid, tid, record, more = base.record_iternext(more)
        kind, _ = read_record(oid, record)
        if kind in CLASSES:
            oids.append(oid)
        elif kind == "ZODB.blob.Blob":
            others[oid] = tid
        if more is None:
            break
    oids.sort(key=lambda oid: read_record(oid, base.load(oid)[0])[0] != "dask_zbig.array.zbigarray.ZBigArray")
    assert z64 not in oids

    def blob(oid):
        sense(oid in others)
        with open(base.loadBlob(oid, others[oid]), "rb") as file:
            return file.read()

    outcomes = collections.Counter()
    for k in range(seed, seed + count):
        print(k, flush=True)
        outcomes[example(random.Random(k), base, oids, blob)] += 1
    print(dict(outcomes))
    base.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
