"""Runs the cells of a script in percent format and writes them, with what they print and draw, as one HTML page."""

from __future__ import annotations

import base64
import contextlib
import html
import io
import re
import sys
from pathlib import Path
from typing import Any

STYLE = """body {font: 16px/1.5 sans-serif; max-width: 52em; margin: 2em auto; padding: 0 1em; color: #222}
pre {background: #f5f5f5; padding: .7em 1em; overflow-x: auto; font-size: 13px; line-height: 1.4}
pre.out {background: none; border-left: 3px solid #9bc; margin-top: -.6em}
code {background: #f5f5f5} img {max-width: 100%}"""


def write(script: str, page: str) -> None:
    """Run `script`, write the file `page`, and each picture beside it as a PNG. An error in a cell is an error."""
    out = Path(page)
    names: dict[str, Any] = {"__name__": "page", "__file__": script}
    parts = []
    pictures = 0
    for cell in re.split(r"^# %%", Path(script).read_text(), flags=re.M)[1:]:
        head, _, source = cell.partition("\n")
        if "[markdown]" in head:
            parts.append(_markdown(source))
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(source, f"<cell {len(parts)}>", "exec"), names)
        parts.append(f"<pre>{html.escape(source.strip())}</pre>")
        if printed.getvalue():
            parts.append(f'<pre class="out">{html.escape(printed.getvalue().rstrip())}</pre>')
        for png in _figures():
            pictures += 1
            out.with_name(f"{out.stem}-{pictures}.png").write_bytes(png)
            parts.append(f'<img alt="picture {pictures}" src="data:image/png;base64,{base64.b64encode(png).decode()}">')
    title = html.escape(Path(script).stem)
    body = "\n".join(parts)
    out.write_text(
        f"<!doctype html>\n<meta charset=utf-8>\n<title>{title}</title>\n<style>{STYLE}</style>\n{body}\n", "utf-8"
    )
    print(f"wrote {out} with {pictures} pictures")


def _figures() -> list[bytes]:
    """What has been drawn since, and close it."""
    plt = sys.modules.get("matplotlib.pyplot")
    found = []
    for number in plt.get_fignums() if plt else ():
        file = io.BytesIO()
        plt.figure(number).savefig(file, format="png", dpi=110)
        found.append(file.getvalue())
    if plt:
        plt.close("all")
    return found


def _markdown(source: str) -> str:
    """Headings, paragraphs, code: no more is used."""
    blocks = []
    text = html.escape("\n".join(line.removeprefix("#").strip() for line in source.strip().splitlines()))
    for line in re.split(r"\n(?=#)|(?<=^)(?=#)", re.sub(r"^(#+ .*)\n", r"\1\n\n", text, flags=re.M)):
        for block in line.split("\n\n"):
            heading = re.match(r"(#+) (.*)", block)
            block = re.sub(r"`([^`]+)`", r"<code>\1</code>", heading[2] if heading else block)
            if block.strip():
                blocks.append(f"<h{len(heading[1])}>{block}</h{len(heading[1])}>" if heading else f"<p>{block}</p>")
    return "\n".join(blocks)
