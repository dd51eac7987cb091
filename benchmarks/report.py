"""The tables as text."""

from __future__ import annotations

from typing import Any

from benchmarks.model import Row, quartiles, value
from benchmarks.peers import VARIANTS
from benchmarks.rows import COUNTS, PEER_CASES, ROWS

__all__ = ["Line", "failures", "lines", "markdown", "text"]

Line = tuple[str, str, str, str, str, str, str]
HEAD: Line = ("case", "ours", "reference", "ratio", "[quartiles]", "target", "met")


def amount(x: float, unit: str) -> str:
    """A number with its unit."""
    if unit == "s":
        for scale, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
            if x >= scale:
                return f"{x / scale:.3g} {name}"
        return f"{x * 1e9:.0f} ns"
    if unit == "B" and x >= 1 << 20:
        return f"{x / (1 << 20):.1f} MiB"
    return f"{x:,.0f} {unit}".rstrip() if x >= 100 or x == int(x) else f"{x:.2f} {unit}".rstrip()


def line(row: Row, found: dict[str, Any]) -> Line | None:
    """A row's medians; None if a side was not run, or skipped."""
    ours = value(found, row.ours)
    if not ours:
        return None
    first, middle, third = quartiles(ours)
    if row.against is None:
        spread = f"[{amount(first, row.unit)} - {amount(third, row.unit)}]" if len(ours) > 1 else ""
        met = "yes" if middle <= row.most else "no"
        return row.title, amount(middle, row.unit), "", "", spread, f"<= {amount(row.most, row.unit)}", met
    theirs = value(found, row.against)
    if not theirs:
        return None
    reference = quartiles(theirs)[1]
    if len(ours) == len(theirs):  # of the same rounds: what disturbs a round disturbs both
        low, ratio, high = quartiles([x / y for x, y in zip(ours, theirs, strict=True)])
    else:
        low, ratio, high = (x / reference for x in (first, middle, third))
    spread = f"[{low:.2f} - {high:.2f}]" if len(ours) > 1 else ""
    met = "yes" if ratio <= row.most else "no"
    ours_text, theirs_text = amount(middle, row.unit), amount(reference, row.unit)
    return row.title, ours_text, theirs_text, f"{ratio:.2f}", spread, f"<= {row.most:.3g}", met


def lines(data: dict[str, Any]) -> list[Line]:
    """The lines of the cases that were run."""
    rows = (line(row, data["sides"]) for row in ROWS if row.case in data["cases"])
    return [found for found in rows if found is not None]


def peer_lines(data: dict[str, Any]) -> list[list[str]]:
    """Each peer's times as multiples of numpy.memmap's; and ours."""
    found, table = data["sides"], []
    kinds = [f"{peer}-{chunk}" for peer, chunk in VARIANTS if any(s.startswith(f"{peer}-{chunk}.") for s in found)]
    for case, (title, ours, memmap, what, key) in PEER_CASES.items():
        base, mine = value(found, memmap), value(found, ours)
        if case.partition("-")[0] not in data["cases"] or not base or not mine:
            continue
        middle = quartiles(base)[1]
        cells = [title, amount(middle, "s"), f"{quartiles(mine)[1] / middle:.2f}"]
        for kind in kinds:
            times = value(found, f"{kind}.{what}:{key}")
            cells.append(f"{quartiles(times)[1] / middle:,.1f}" if times else "")
        table.append(cells)
    return [["times as long as memmap", "memmap", "ours", *kinds], *table] if table else []


def counts(data: dict[str, Any]) -> list[str]:
    """What noise cannot touch."""
    text = []
    for name, keys in COUNTS.items():
        pairs = [f"{key} {quartiles(value(data['sides'], f'{name}:{key}'))[1]:,.6g}" for key in keys
                 if value(data["sides"], f"{name}:{key}")]  # fmt: skip
        if pairs:
            text.append(f"  {name}: {', '.join(pairs)}")
    return text


def _columns(table: list[list[str]]) -> list[str]:
    widths = [max(len(cells[i]) for cells in table) for i in range(len(table[0]))]
    return [
        "  ".join(
            [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]
        ).rstrip()
        for cells in table
    ]


def text(data: dict[str, Any]) -> str:
    """All of it."""
    out = [
        f"{data['mib']} MiB of float64, medians of {data['rounds']} rounds, {data['cpus']} CPUs, "
        f"Linux {data['kernel']}, Python {data['python']}, load {data['load'][0]:.1f}.",
        "Durable on both sides, sync every 64 MiB; each side a process of its own; page cache warm. Reference:",
        "numpy.memmap + flush unless said. The ratio is the median of the rounds' ratios; less is better.",
        "",
    ]
    out += _columns([list(HEAD), *map(list, lines(data))])
    if table := peer_lines(data):
        out += ["", *_columns(table), "(NAME-CHUNK: chunks of 2 or 64 MiB, raw; only Icechunk is transactional)"]
    if data["absent"]:
        out.append(f"Not installed: {', '.join(data['absent'])} (pip install '.[bench]')")
    if found := counts(data):
        out += ["", "Counts (of small commits: each):", *found]
    out += [
        f"  skipped: {name}: {results[0]['skipped']}"
        for name, results in data["sides"].items()
        if results and "skipped" in results[0]
    ]
    out += ["", "Each side:", *(f"  {name}: {what}" for name, what in data["durable"].items())]
    return "\n".join(out)


def failures(data: dict[str, Any]) -> list[str]:
    """What went wrong."""
    return [
        f"{name} failed:\n{result['failed']}"
        for name, results in data["sides"].items()
        for result in results
        if "failed" in result
    ]


def markdown(data: dict[str, Any]) -> str:
    """The table of the cases, and that of the peers, for the README."""
    out: list[str] = []
    for table in ([list(HEAD), *map(list, lines(data))], peer_lines(data)):
        if table:
            out += ["| " + " | ".join(cells) + " |" for cells in table]
            out.insert(len(out) - len(table) + 1, "|" + "---|" * len(table[0]))
            out.append("")
    return "\n".join(out)
