# %% [markdown]
# # dask_zbig, step by step
# As a notebook: run it cell by cell in an editor that knows `# %%`, or have it written as a page with all outputs and
# pictures: `python examples/walkthrough.py --html page.html`. Run as it is, it prints what the cells print.
# Needs: `pip install 'dask_zbig[examples]'`. Takes some seconds.

# %%
import os
import sys
import tempfile

try:
    import matplotlib as mpl
    from statsmodels.datasets import co2, sunspots
except ImportError:
    print("this example needs matplotlib and statsmodels: pip install 'dask_zbig[examples]'")
    raise SystemExit(0) from None

if "--html" in sys.argv and __name__ == "__main__":  # the page is made by the other half of this example
    import runpy

    page = runpy.run_path(os.path.join(os.path.dirname(os.path.abspath(__file__)), "notebook", "page.py"))
    page["write"](__file__, sys.argv[sys.argv.index("--html") + 1])
    raise SystemExit(0)

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import transaction

import dask_zbig as dz

# %% [markdown]
# ## A database with an array
# A database is a file here, used by this process alone. An array is stored as any object, by a name in the root.

# %%
directory = tempfile.TemporaryDirectory()
db = dz.open(os.path.join(directory.name, "x.fs"))
connection = db.open()
root = connection.root()
series = co2.load_pandas().data["co2"].dropna()
root["co2"] = A = dz.ZBigArray(0, [("week", "M8[D]"), ("ppm", "f4")])
new = np.zeros(len(series), A.dtype)
new["week"], new["ppm"] = series.index, series
A.append(new)
transaction.commit()
print(repr(A), A.nbytes, "bytes")
print(A[:3])

# %% [markdown]
# What an index returns is a real ndarray. So everything that takes arrays takes it, here Matplotlib.

# %%
figure, axes = plt.subplots(figsize=(8, 3))
axes.plot(A["week"], A["ppm"], linewidth=1)
axes.set_title("CO2 at Mauna Loa")
axes.set_ylabel("ppm")
figure.tight_layout()

# %% [markdown]
# ## Change, look, take it back
# A view is the array: writing to it changes the array, in this transaction. Nobody else sees it before the commit, and
# after an abort it never was.

# %%
ppm = A["ppm"][:52]
ppm += 100
print("changed: ", A["ppm"][:3])
transaction.abort()
print("aborted: ", A["ppm"][:3], "and the same view:", ppm[:3])
assert A["ppm"][0] == np.float32(series.iloc[0])

# %% [markdown]
# ## A terabyte
# Space is taken by what was written, and a commit costs what has changed.

# %%
before = os.path.getsize(os.path.join(directory.name, "x.fs"))
root["big"] = big = dz.ZBigArray((1 << 17, 1 << 20), "f8")
spots = sunspots.load_pandas().data.to_numpy()
big[70_000, 500_000 : 500_000 + len(spots)] = spots[:, 1]
transaction.commit()
grown = os.path.getsize(os.path.join(directory.name, "x.fs")) - before
print(f"{big.nbytes >> 40} TiB of zeros and {len(spots)} sunspot numbers: the file has grown by {grown:,} bytes")
assert np.isclose(big[70_000].sum(), spots[:, 1].sum())
assert grown < 20_000

# %%
figure, axes = plt.subplots(figsize=(8, 2.5))
axes.bar(spots[:, 0], big[70_000, 500_000 : 500_000 + len(spots)], width=1, color="tab:orange")
axes.set_title("sunspots by year, out of the middle of a terabyte")
figure.tight_layout()

# %% [markdown]
# ## With Dask
# A stored array becomes a Dask array that reads one snapshot. Here threads compute; with `dz.serve` a whole cluster
# does, and what it writes is one atomic save.

# %%
root["picture"] = P = dz.ZBigArray((600, 900), "f4")
transaction.commit()
y, x = np.ogrid[-1.2:1.2:600j, -2.2:1.1:900j]
c = dz.ZBigArray((600, 900), "c16")
c[:] = x + 1j * y
root["plane"] = c
transaction.commit()


def mandelbrot(block):
    z, n = np.zeros_like(block), np.zeros(block.shape, "f4")
    for _ in range(60):
        z = np.where(abs(z) < 4, z * z + block, z)
        n += abs(z) < 4
    return n


lazy = dz.from_zbigarray(c, chunks=(100, -1)).map_blocks(mandelbrot, dtype="f4")
with dz.CommitCoordinator(connection) as save:
    save.store(lazy, P)
print(lazy)
print(save.result.segments, "segments,", save.result.bytes, "bytes, one transaction")

# %%
figure, axes = plt.subplots(figsize=(6, 4))
axes.imshow(P, cmap="magma")
axes.set_axis_off()
figure.tight_layout()

# %% [markdown]
# ## The past
# Every commit is a snapshot that can be read as long as nobody packs the database.

# %%
versions = []
for power in (1, 0.5, 0.25):
    P[:300] = mandelbrot(c[:300]) ** power
    transaction.commit()
    versions.append(db.lastTransaction())
figure, row = plt.subplots(1, 3, figsize=(9, 2.2))
for axes, tid in zip(row, versions, strict=True):
    axes.imshow(dz.from_zbigarray(P, at=tid)[:300].compute(scheduler="threads"), cmap="magma")
    axes.set_title(tid.hex(), fontsize=8)
    axes.set_axis_off()
figure.tight_layout()
assert dz.from_zbigarray(P, at=versions[0])[:300].max().compute(scheduler="threads") == 60

# %%
plt.close("all")
connection.close()
db.close()
directory.cleanup()
