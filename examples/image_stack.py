"""A cluster takes the noise out of a stack of pictures, where each chunk needs a margin of its neighbours.

Shows: `map_overlap` on a stored array, saved atomically by `CommitCoordinator`. The picture is a photograph that
scikit-learn ships; the stack is that, moving, and with noise.

Run: pip install 'dask_zbig[examples]'; python examples/image_stack.py [--frames N] [--png FILE]
"""

from __future__ import annotations

import argparse
import os
import tempfile

import numpy as np
import transaction
from distributed import Client, LocalCluster

import dask_zbig as dz

try:
    from PIL import Image
    from sklearn.datasets import load_sample_image
except ImportError:
    print("this example needs scikit-learn and Pillow: pip install 'dask_zbig[examples]'")
    raise SystemExit(0) from None


def smooth(stack: np.ndarray) -> np.ndarray:
    """The median over time of 5 frames, where there are 2 on both sides."""
    frames = np.stack([stack[i : len(stack) - 4 + i] for i in range(5)])
    out = stack.copy()
    out[2:-2] = np.median(frames, axis=0).astype(stack.dtype)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--png", help="where to write one frame, before and after")
    options = parser.parse_args()
    picture = load_sample_image("china.jpg").mean(axis=2).astype("u1")
    noise = np.random.default_rng(1)
    with (
        tempfile.TemporaryDirectory() as directory,
        dz.serve(os.path.join(directory, "x.fs")) as uri,
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, local_directory=directory) as cluster,
        Client(cluster),
    ):
        db = dz.open(uri)
        connection = db.open()
        root = connection.root()
        root["noisy"] = noisy = dz.ZBigArray((0, *picture.shape), "u1")
        for _ in range(options.frames):  # each 20th pixel is black or white
            frame = picture.copy()
            where = noise.random(picture.shape) < 0.05
            frame[where] = noise.choice([0, 255], where.sum())
            noisy.append(frame[None])
        root["clean"] = clean = dz.ZBigArray(noisy.shape, "u1")
        root["error"] = error = dz.ZBigArray(len(noisy), "f8")
        transaction.commit()
        print(f"{noisy!r}: {noisy.nbytes >> 20} MiB")

        x = dz.from_zbigarray(noisy, chunks=(8, -1, -1))
        y = x.map_overlap(smooth, depth=(2, 0, 0), boundary="none", dtype="u1")
        with dz.CommitCoordinator(connection) as save:
            save.store(y, clean)
            save.store(abs(y.astype("i2") - picture).mean(axis=(1, 2)), error)
        assert save.result is not None
        print(f"saved {save.result.bytes >> 20} MiB by {save.result.segments} segments at once")

        before = np.abs(noisy[2:-2].astype("i2") - picture).mean()
        print(f"mean error of a pixel: {before:.2f} before, {error[2:-2].mean():.2f} after")
        assert np.array_equal(clean[:], smooth(noisy[:])), "chunks or not, it is the same"
        assert error[2:-2].mean() < before / 20
        if options.png:
            middle = options.frames // 2
            Image.fromarray(np.concatenate([noisy[middle], clean[middle]], axis=1)).save(options.png)
            print(f"look at {options.png}")
        connection.close()
        db.close()


if __name__ == "__main__":
    main()
