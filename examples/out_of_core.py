"""A signal four times as large as the memory that this process may have: made, saved, read, analysed.

Shows: one transaction that is larger than memory, plain NumPy on pieces of an array, and what both cost in memory. The
kernel itself watches over that: this process gets a limit (RLIMIT_DATA) on memory of its own, and one byte more is a
MemoryError. What it maps of the array lies in files and counts for nothing, as the kernel can always drop it.

Run: python examples/out_of_core.py [--size MiB]
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time

import numpy as np
import transaction

import dask_zbig as dz

RATE = 1000.0  # samples a second
TONES = {50.0: 1.0, 123.0: 0.25}  # Hz: amplitude
PIECE = 1 << 19  # samples


def own_memory(field: str = "VmData") -> int:
    """Bytes of memory of this process that are in no file."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(field))


def signal(first: int, n: int) -> np.ndarray:
    t = np.arange(first, first + n) / RATE
    noise = np.random.default_rng(first).normal(scale=0.5, size=n)
    return noise + sum(a * np.sin(2 * np.pi * f * t) for f, a in TONES.items())


def spectrum(x: np.ndarray, n: int = 4096) -> np.ndarray:
    """The mean power spectrum of a piece."""
    return (np.abs(np.fft.rfft(x.reshape(-1, n) * np.hanning(n), axis=1)) ** 2).mean(axis=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=256, help="of the signal, in MiB")
    samples = parser.parse_args().size * (1 << 20) // 8 // PIECE * PIECE
    with tempfile.TemporaryDirectory() as directory:
        db = dz.open(os.path.join(directory, "x.fs"))
        connection = db.open()
        connection.root()["signal"] = array = dz.ZBigArray(samples, "f8")
        transaction.commit()

        array[:PIECE] = signal(0, PIECE)  # (so that threads have been started, and NumPy has loaded what it needs)
        spectrum(array[:PIECE])
        transaction.abort()
        allowance = max(array.nbytes // 4, 48 << 20)
        limit = own_memory() + allowance
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        print(f"a signal of {array.nbytes >> 20} MiB; this process may have {allowance >> 20} MiB more than it has")
        try:
            np.ones(samples)
        except MemoryError:
            print("in memory: MemoryError")
        else:
            raise AssertionError("the limit is none")

        peak, started = 0, time.perf_counter()
        for first in range(0, samples, PIECE):
            array[first : first + PIECE] = signal(first, PIECE)
            peak = max(peak, own_memory("RssAnon"))
        wrote = time.perf_counter() - started
        transaction.commit()  # all of it, at once
        print(f"written in {wrote:.1f} s, committed in {time.perf_counter() - started - wrote:.1f} s")

        started = time.perf_counter()
        total = squares = 0.0
        power = np.zeros(2049)
        for first in range(0, samples, PIECE):
            view = array[first : first + PIECE]  # a real ndarray: nothing is copied
            total += float(view.sum())
            squares += float(view @ view)
            power += spectrum(view)
            peak = max(peak, own_memory("RssAnon"))
        mean, rms = total / samples, (squares / samples) ** 0.5
        found = np.sort(np.fft.rfftfreq(4096, 1 / RATE)[np.argsort(power)[::-1]][:1])
        print(f"read and analysed in {time.perf_counter() - started:.1f} s")
        print(f"mean {mean:+.5f}, root of mean square {rms:.4f}, strongest tone {found[0]:.1f} Hz")
        print(f"peak of memory of its own: {peak >> 20} MiB")

        expected = (sum(a * a / 2 for a in TONES.values()) + 0.25) ** 0.5
        assert abs(mean) < 1e-3
        assert abs(rms - expected) < 1e-3
        assert abs(found[0] - 50) < 0.3
        connection.close()
        db.close()


if __name__ == "__main__":
    main()
