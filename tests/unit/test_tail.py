"""The end of a Data.fs: transactions that are finished stay, the one that is not goes, wherever sectors begin."""

from __future__ import annotations

import io
import struct

import pytest
from ZODB.FileStorage.format import TRANS_HDR, TRANS_HDR_LEN

from dask_zbig.storage.tail import unfinished

SECTOR = 512


def record(data, status=b" "):
    length = TRANS_HDR_LEN + len(data)
    header = struct.pack(TRANS_HDR, b"\3\xfd\0\0\0\0\0\1", length, status, 0, 0, 0)
    return header + data + length.to_bytes(8, "big")


def end_of(*records):
    return unfinished(io.BytesIO(b"FS30" + b"".join(records)), 4)


# A header of 23 bytes lies across sectors in 22 ways: so each test is done at each place of a sector.


def test_finished_ones_stay():
    for at in range(SECTOR):
        assert end_of(record(bytes(at + 1)), record(b"b" * 700)) is None


def test_the_unfinished_goes():
    last = record(b"b" * 1500, b"c")
    for at in range(SECTOR):
        first = record(bytes(at + 1))
        assert end_of(first, last) == 4 + len(first)
        assert end_of(first, last[: at + 1]) == 4 + len(first)


def test_sectors_of_it_may_be_missing():
    last = record(b"b" * 1500, b"c")
    for at in range(SECTOR):
        first = record(bytes(at + 1))
        start = 4 + len(first)
        for sector in range(start // SECTOR * SECTOR, start + len(last), SECTOR):
            lo, hi = max(sector - start, 0), min(sector + SECTOR - start, len(last))
            assert end_of(first, last[:lo] + bytes(hi - lo) + last[hi:]) == start
            assert end_of(first, bytes(hi) + last[hi:]) == start


@pytest.mark.parametrize("damage", [b"c", b"\0", b"x"])
def test_damage_before_the_end_is_not_for_us(damage):
    """Nothing is cut off that was promised."""
    first, last = bytearray(record(b"a" * 100)), record(b"b" * 100)
    first[16:17] = damage
    assert end_of(bytes(first), last) is None


def test_nothing_there():
    assert end_of() is None
    assert end_of(b"ab") == 4
