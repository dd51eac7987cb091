"""Which bytes of windows are mapped, and which were changed, as the kernel has it.

The core keeps this by pages and blocks, for its handler. Whoever wants a picture asks the kernel: what is absent has
no rights, what is clean may be read, what is dirty may be written. Nothing is touched, and nothing waits.
"""

from __future__ import annotations

from collections.abc import Iterable

from dask_zbig.memory.space import Window

__all__ = ["Run", "states"]

Run = tuple[int, int]
"""Bytes [start, stop) of a file."""


def states(windows: Iterable[Window]) -> tuple[list[Run], list[Run]]:
    """The bytes of a file that are mapped in some window, and those of them that are dirty.

    Returns
    -------
    mapped, dirty
        Unsorted, and overlapping if windows do. What a savepoint has frozen is no longer dirty here.

    Notes
    -----
    Thread-safe. Takes time in proportion to the mappings of the process: 65,530 at most, as a rule, which take 0.1 s.
    """
    places = [(w.address, w.address + w.length, w.start) for w in windows]
    mapped: list[Run] = []
    dirty: list[Run] = []
    if not places:
        return mapped, dirty
    with open("/proc/self/maps", "rb") as file:
        for line in file:
            addresses, rights, _ = line.split(b" ", 2)
            if not rights.startswith(b"r"):
                continue
            first, _, last = addresses.partition(b"-")
            lo, hi = int(first, 16), int(last, 16)
            for begin, end, start in places:
                if lo < end and hi > begin:
                    run = (max(lo, begin) - begin + start, min(hi, end) - begin + start)
                    mapped.append(run)
                    if rights[1:2] == b"w":
                        dirty.append(run)
    return mapped, dirty
