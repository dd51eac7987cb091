"""The chart: how many times as long as numpy.memmap each store takes. Needs matplotlib."""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.model import quartiles, value
from benchmarks.peers import VARIANTS
from benchmarks.rows import PEER_CASES

__all__ = ["best", "draw"]

COLOURS = {"dask_zbig": "#d1495b", "zarr": "#7d8ca3", "icechunk": "#9fb3c8", "h5py": "#b7a57a", "tiledb": "#a3a3a3"}


def best(data: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Case -> store -> ratio to numpy.memmap; of a peer's chunk sizes the one that is best at that case."""
    charted: dict[str, dict[str, float]] = {}
    for case, (title, ours, memmap, what, key) in PEER_CASES.items():
        base, mine = value(data["sides"], memmap), value(data["sides"], ours)
        if case.partition("-")[0] not in data["cases"] or not base or not mine:
            continue
        middle = quartiles(base)[1]
        ratios = {"dask_zbig": quartiles(mine)[1] / middle}
        for peer, chunk in VARIANTS:
            if times := value(data["sides"], f"{peer}-{chunk}.{what}:{key}"):
                ratio = quartiles(times)[1] / middle
                ratios[peer] = min(ratio, ratios.get(peer, ratio))
        charted[title] = ratios
    return charted


def draw(data: dict[str, Any], path: str) -> None:
    """Draw it into an .svg or .png file."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("--chart needs matplotlib: pip install '.[bench]'")
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "zbig", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    charted = best(data)
    if not charted:
        sys.exit("--chart: no case was run that has peers")
    figure, axes = pyplot.subplots(1, len(charted), figsize=(2.4 * len(charted), 2.6), layout="constrained")
    for axis, (title, ratios) in zip([axes] if len(charted) == 1 else axes, charted.items(), strict=True):
        names = list(ratios)[::-1]
        bars = axis.barh(names, [ratios[name] for name in names], color=[COLOURS[name] for name in names])
        axis.bar_label(bars, labels=[f"{ratios[name]:,.3g}" for name in names], padding=2)
        axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
        axis.set_xscale("log")
        axis.set_xlim(min(0.3, *ratios.values()) / 1.5, max(ratios.values()) * 12)
        axis.set_title(title, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="x", which="both", labelbottom=False, length=0)
    figure.suptitle(f"times as long as numpy.memmap (dotted), {data['mib']} MiB, durable; log scale", fontsize=9)
    figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)
