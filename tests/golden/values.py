"""What is in the golden database. Never to be changed: only added to, with another database beside the first."""

from __future__ import annotations

import numpy as np

RECORD = np.dtype([("id", "<i8"), ("name", "S5"), ("x", ">f4", (2,)), ("t", "<M8[us]")])
JOB = "golden-job"
TERABYTE = 1 << 40
#: Bytes of the sparse array "tera", by position: in the first leaf, across two leaves, in another node, the last one.
TERA = {5: 1, 70_000: 2, (64 << 20) - 1: 3, 64 << 20: 4, (1 << 36) + 9: 5, TERABYTE - 1: 6}


def values():
    """The arrays, by name; "tera" is missing."""
    blob = np.zeros((4, 5000), "<u2")
    blob[0] = np.arange(5000) * 7 + 1
    blob[2, 1000:] = np.arange(4000) * 3 + 2
    records = np.zeros(9, RECORD)
    records["id"] = np.arange(9) ** 3 - 4
    records["name"] = [b"abcde"[: k % 6] for k in range(9)]
    records["x"] = np.arange(18).reshape(9, 2) / 8
    records["t"] = np.datetime64("2024-02-29T12:00:00", "us") + np.arange(9) * 86_400_000_001
    return {
        "c": np.sin(np.arange(1200.0)).reshape(40, 30),
        "f": np.asfortranarray(np.arange(385, dtype="<i4").reshape(7, 11, 5) - 99),
        "blob": blob,
        "joined": (np.arange(64 * 16) * 37 % 251 + 1).astype("u1"),
        "joined-blob": (np.arange(16 * 1024) * 2654435761 % 2**32 + 1).astype("<u8"),
        "records": records,
        "times": np.datetime64("1969-12-31T23:59:59", "s") + np.arange(20).astype("<m8[s]"),
        "truth": np.arange(77) % 3 == 0,
        "complex": np.exp(1j * np.arange(12)).astype("<c16").reshape(3, 4),
        "big-endian": (np.arange(30) ** 2).astype(">i8"),
        "text": np.array(["", "a", "ä", "日本語"] * 3, "<U4"),
        "shrunk": np.concatenate([np.arange(1, 101), np.zeros(50), np.arange(3)]).astype("<i2"),
        "empty": np.zeros((0, 3), "<f4"),
        "scalar": np.array(42, "<i4"),
    }
