"""scikit-learn learns from an array in a database, by views of it: no copies, little memory.

Shows: views are real ndarrays, so whoever takes those takes a stored array; a model and its data in one database; and
what a pass over all of it costs in memory of its own. The data are the handwritten digits that scikit-learn ships,
many times, with noise.

Run: pip install 'dask_zbig[examples]'; python examples/machine_learning.py [--copies N]
"""

from __future__ import annotations

import argparse
import os
import tempfile

import numpy as np
import transaction
from persistent.mapping import PersistentMapping

import dask_zbig as dz

try:
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.datasets import load_digits
    from sklearn.decomposition import IncrementalPCA
    from threadpoolctl import threadpool_limits
except ImportError:
    print("this example needs scikit-learn: pip install 'dask_zbig[examples]'")
    raise SystemExit(0) from None

BATCH = 5000


def own_memory() -> int:
    """Bytes of memory of this process that are in no file."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--copies", type=int, default=40, help="of the 1797 digits: 0.9 MB each")
    copies = parser.parse_args().copies
    images, labels = load_digits(return_X_y=True)
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as directory:
        db = dz.open(os.path.join(directory, "x.fs"))
        connection = db.open()
        root = connection.root()
        root["images"] = X = dz.ZBigArray((0, 64), "f8")
        root["labels"] = y = dz.ZBigArray(0, "i1")
        for _ in range(copies):
            X.append(images + random.normal(scale=2, size=images.shape))
            y.append(labels, casting="unsafe")
        transaction.commit()
        print(f"{X!r}: {X.nbytes >> 20} MiB")

        pca = IncrementalPCA(n_components=16)
        kmeans = MiniBatchKMeans(n_clusters=30, random_state=0, batch_size=BATCH, n_init=3)
        before = peak = own_memory()
        batches = [X[i : i + BATCH] for i in range(0, len(X) // BATCH * BATCH, BATCH)]
        for batch in batches:
            assert np.shares_memory(batch, X[...])  # the array itself, not a copy
            pca.partial_fit(batch, check_input=False)
            peak = max(peak, own_memory())
        for batch in batches:
            kmeans.partial_fit(pca.transform(batch))
            peak = max(peak, own_memory())
        print(f"16 components hold {pca.explained_variance_ratio_.sum():.0%} of the variance")

        # Which digit is a cluster? The one of most of its first 1797 members. How often is that right?
        found = kmeans.predict(pca.transform(X[: len(images)]))
        digit = np.array([np.bincount(labels[found == k], minlength=10).argmax() for k in range(30)])
        right = np.mean(
            [(digit[kmeans.predict(pca.transform(b))] == t).mean() for b, t in zip(batches, _cut(y), strict=True)]
        )
        peak = max(peak, own_memory())
        print(f"digits told apart without having been told: {right:.0%}")
        print(f"memory of its own that this took: {(peak - before) >> 20} MiB of {X.nbytes >> 20} MiB")

        # The model goes into the same database, in one transaction with what it says of the data.
        root["model"] = PersistentMapping(components=pca.components_, centres=kmeans.cluster_centers_)
        root["clusters"] = clusters = dz.ZBigArray(len(X), "i2")
        for i in range(0, len(X), BATCH):
            clusters[i : i + BATCH] = kmeans.predict(pca.transform(X[i : i + BATCH]))
        transaction.commit()

        assert 0.7 < right <= 1
        assert pca.explained_variance_ratio_.sum() > 0.6
        assert len(np.unique(clusters)) == 30
        assert peak - before < max(X.nbytes // 2, 64 << 20)
        connection.close()
        db.close()


def _cut(y: dz.ZBigArray) -> list[np.ndarray]:
    return [y[i : i + BATCH] for i in range(0, len(y) // BATCH * BATCH, BATCH)]


if __name__ == "__main__":
    with threadpool_limits(1):  # for batches as small as these more threads only get in each other's way
        main()
