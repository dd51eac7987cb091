"""The table: what is compared with what, and how good it is to be. Ratios are seconds by seconds: less is better."""

from __future__ import annotations

from benchmarks.model import SIDES, Row
from benchmarks.peers import VARIANTS

__all__ = ["CASES", "COUNTS", "PEER_CASES", "ROWS", "case_sides"]

ROWS = [
    # bulk write
    Row("write", "write through a view", "write.view:seconds", "write.memmap:seconds", 1.0),
    Row("write", "... the part that is not sync", "write.view:fill", "write.memmap:fill", 0.9),
    Row("write", "... write faults per MiB", "write.view:faults_per_mib", None, 1.0, ""),
    Row("write", "A[i:j] = x", "write.assign:seconds", "write.memmap:seconds", 0.9),
    Row("write", "... vs write(2) + fsync", "write.assign:seconds", "write.plain:seconds", 1.1),
    Row("write", "A.append(x)", "write.append:seconds", "write.memmap:seconds", 0.9),
    Row("write", "... vs write(2) + fsync", "write.append:seconds", "write.plain:seconds", 1.1),
    Row("write-zeo", "write, ZEO, shared blobs, vs no ZEO", "write.zeo:seconds", "write.view:seconds", 1 / 0.85),
    Row("write-zeo", "write, ZEO, blob cache, vs no ZEO", "write.zeo-cache:seconds", "write.view:seconds", 2.0),
    # read
    Row("read", "read + sum, fresh process", "read.view:seconds", "read.memmap:seconds", 0.7),
    Row("read", "... vs memmap of our segment files", "read.view:seconds", "read.segments:seconds", 1.05),
    Row("read-zeo", "read + sum, ZEO, shared blobs", "read.zeo:seconds", "read.memmap:seconds", 0.8),
    Row("read-zeo", "read + sum, ZEO, warm blob cache", "read.zeo-cache:seconds", "read.memmap:seconds", 0.8),
    Row("random", "2,000 random 8-byte reads", "random.view:seconds", "random.memmap:seconds", 1.5),
    Row("index", "A[i], hot", "index.hot:item", None, 2e-6),
    Row("index", "A[i:j], hot", "index.hot:slice", None, 5e-6),
    # small commits
    Row("append", "append 1 KiB + commit, vs raw ZODB", "append.view:seconds", "commit.zodb:seconds", 2.0),
    Row("append", "... growth over 10,000", "append.many:grown", None, 2048, "B"),
    Row("append", "... read back, vs bulk-written", "append.readback:many", "append.readback:bulk", 1.3),
    Row("append-zeo", "append 1 KiB + commit, vs raw, ZEO", "append.zeo:seconds", "append.zodb-zeo:seconds", 2.0),
    Row("update", "update 8 B + commit, vs raw ZODB", "update.view:seconds", "commit.zodb:seconds", 2.5),
    Row("update", "... growth", "update.view:grown", None, 1024, "B"),
    Row("update-zeo", "update 8 B + commit, vs raw, ZEO", "update.zeo:seconds", "append.zodb-zeo:seconds", 2.0),
    # large
    Row("sparse", "open, view, read, commit: 1 TiB / 1 GiB", "sparse.tib:seconds", "sparse.gib:seconds", 1.5),
    Row("sparse", "... 1 PiB / 1 GiB", "sparse.pib:seconds", "sparse.gib:seconds", 1.5),
    Row("fragments", "view of 100,000 extents", "fragments.read:view", None, 0.1),
    Row("fragments", "... sum", "fragments.read:sum", "fragments.memmap:sum", 2.0),
    Row("fragments", "... mappings", "fragments.read:mappings", None, 65_000, ""),
    Row("change", "4 KiB + commit: 8 GiB / 64 MiB array", "change.sizes:large", "change.sizes:small", 1.5),
    Row("change", "GiB changed: in one of 4 GiB / 256 MiB", "change.sizes:per_gib", "change.sizes:per_gib_256", 1.5),
    Row("change", "... anonymous memory, peak", "change.sizes:peak", None, 100 << 20, "B"),
    Row("limit", "transaction / memory limit, inverse", "limit.transaction:limit_over_amount", None, 0.5, ""),
    # Dask
    Row("dask", "from_zbigarray sum, threads", "dask.view:threads", "dask.memmap:threads", 1.3),
    Row("dask", "from_zbigarray sum, 2 processes", "dask.view:processes", "dask.memmap:processes", 1.3),
    Row("store", "to_zbigarray, vs to_zarr", "store.view:seconds", "store.zarr:seconds", 0.8),
    Row("store", "... vs the local bulk write", "store.view:seconds", "write.view:seconds", 1 / 0.7),
    # core
    Row("fault", "write fault on a hole, vs bare signal", "fault.c:hole_ns", "fault.c:bare_ns", 3.0, "ns"),
    Row("fault", "write fault on clean pages", "fault.c:clean_ns", "fault.c:bare_ns", 3.0, "ns"),
    Row("import", "import, vs dask.array + ZODB", "import.time:ours", "import.time:theirs", 1.2),
]

CASES = list(dict.fromkeys(row.case for row in ROWS))

#: Where peers are measured too: case -> (title, our side, memmap's side, what the peer's side is called, key).
PEER_CASES = {
    "write": ("write", "write.assign:seconds", "write.memmap:seconds", "write", "seconds"),
    "read": ("read + sum", "read.view:seconds", "read.memmap:seconds", "read", "seconds"),
    "random": ("2,000 random reads", "random.view:seconds", "random.memmap:seconds", "random", "seconds"),
    "append": ("append 1 KiB, durable", "append.view:seconds", "append.memmap:seconds", "append", "seconds"),
    "dask": ("Dask sum, threads", "dask.view:threads", "dask.memmap:threads", "dask", "threads"),
    "dask-processes": ("Dask sum, processes", "dask.view:processes", "dask.memmap:processes", "dask", "processes"),
}

#: What noise cannot touch; printed after the tables.
COUNTS = {
    "write.view": ["faults"],
    "write.assign": ["faults"],
    "write.append": ["faults"],
    "read.view": ["read_faults", "mappings"],
    "read.zeo-cache": ["read_faults", "mappings"],
    "random.view": ["read_faults"],
    "index.hot": ["fills"],
    "commit.zodb": ["grown", "written", "stores"],
    "append.view": ["grown", "written", "loads", "stores", "write_faults", "fills"],
    "append.zodb-zeo": ["grown", "stores", "round_trips"],
    "append.zeo": ["grown", "loads", "stores", "write_faults", "fills", "round_trips"],
    "update.view": ["grown", "written", "loads", "stores", "write_faults", "fills"],
    "update.zeo": ["grown", "loads", "stores", "write_faults", "fills", "round_trips"],
    "sparse.pib": ["mappings"],
    "fragments.read": ["extents", "mappings", "read_faults"],
    "change.sizes": ["mappings", "peak"],
    "limit.transaction": ["anonymous"],
    "syscalls.commit": ["append_calls", "append_syncs", "zodb_calls", "zodb_syncs"],
    "fault.c": ["sequential_faults_per_mib"],
}


def case_sides(case: str, peers: list[str], quick: bool) -> list[str]:
    """The sides that a case compares; when it must be quick, peers have one chunk size."""
    variants = [(peer, chunk) for peer, chunk in VARIANTS if peer in peers and (chunk == 2 or not quick)]
    names = [which.partition(":")[0] for row in ROWS if row.case == case for which in (row.ours, row.against) if which]
    for key, (_, ours, memmap, what, _) in PEER_CASES.items():
        if key.partition("-")[0] == case:
            names += [ours.partition(":")[0], memmap.partition(":")[0]]
            names += [f"{peer}-{chunk}.{what}" for peer, chunk in variants]
    if case == "append":
        names.append("syscalls.commit")
    return [name for name in dict.fromkeys(names) if not SIDES[name].peer or SIDES[name].peer in peers]
