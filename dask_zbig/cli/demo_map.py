"""The demo's picture: the land fraction of each 1/4 degree as a map, and of each band of latitude beside it."""

from __future__ import annotations

import os
import secrets
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from dask_zbig.cli.demo_report import percent

__all__ = ["draw_map"]

MAP = (1440, 720)
LEFT, TOP, GAP, PANEL, RIGHT, BOTTOM = 56, 96, 24, 250, 28, 92
PAPER, INK, FAINT = (250, 248, 242), (38, 50, 60), (120, 130, 136)
DEEP, SHALLOW = (43, 92, 138), (122, 176, 200)
#: Land fraction -> colour.
STOPS = (
    (0.0, SHALLOW),
    (0.15, (168, 202, 196)),
    (0.40, (222, 210, 166)),
    (0.70, (176, 178, 112)),
    (1.0, (96, 134, 74)),
)


def draw_map(fractions: npt.NDArray[np.float32], earth: float, bands: npt.NDArray[np.float64], path: str) -> None:
    """Write a PNG file, all at once.

    Parameters
    ----------
    fractions
        Land fraction by cell, north first, from 180 degrees west.
    earth, bands
        The land fraction of the Earth, and of each band of latitude from north to south.
    path
        The file.
    """
    size = (LEFT + MAP[0] + GAP + PANEL + RIGHT, TOP + MAP[1] + BOTTOM)
    image = Image.new("RGB", size, PAPER)
    image.paste(_world(fractions), (LEFT, TOP))
    draw = ImageDraw.Draw(image, "RGBA")
    draw.text((LEFT, 26), f"{percent(earth)} of the Earth is land", INK, _font(40))
    grid = f"{fractions.shape[0]} x {fractions.shape[1]} cells"
    _right(draw, LEFT + MAP[0], 50, f"land fraction of {grid}, computed with Dask, stored in ZODB", FAINT, 18)
    _graticule(draw)
    _bands(draw, bands)
    _legend(draw)
    temporary = f"{path}.{secrets.token_hex(4)}"
    try:
        image.save(temporary, "PNG", optimize=True)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _right(draw: Any, x: float, y: float, text: str, fill: Any, size: int) -> None:
    draw.text((x, y), text, fill, _font(size), anchor="ra")


def _land_colours(fractions: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    stops = [s for s, _ in STOPS]
    return np.stack([np.interp(fractions, stops, [c[i] for _, c in STOPS]) for i in range(3)], axis=-1)


def _world(fractions: npt.NDArray[np.float32]) -> Image.Image:
    """Land by its fraction; the open sea gets lighter towards the coasts."""
    wrapped = np.pad(fractions, ((0, 0), (40, 40)), mode="wrap")
    grey = Image.fromarray((wrapped * 255).astype("u1")).filter(ImageFilter.GaussianBlur(12))
    near = np.clip(np.asarray(grey)[:, 40:-40, None] / 150, 0, 1)
    sea = np.array(DEEP) + (np.array(SHALLOW) - DEEP) * near
    pixels = np.where(fractions[..., None] > 0, _land_colours(fractions), sea)
    world = Image.fromarray(pixels.round().astype("u1"), "RGB")
    return world if world.size == MAP else world.resize(MAP, Image.Resampling.NEAREST)


def _graticule(draw: Any) -> None:
    width, height = MAP
    for degrees in range(-150, 180, 30):
        x = LEFT + (degrees + 180) * width // 360
        draw.line((x, TOP, x, TOP + height), (255, 255, 255, 45))
        draw.text((x, TOP + height + 6), _degrees(degrees, "E", "W"), FAINT, _font(14), anchor="ma")
    for degrees in range(-60, 90, 30):
        y = TOP + (90 - degrees) * height // 180
        draw.line((LEFT, y, LEFT + width, y), (255, 255, 255, 80 if degrees == 0 else 45))
        draw.text((LEFT - 8, y), _degrees(degrees, "N", "S"), FAINT, _font(14), anchor="rm")


def _degrees(value: int, positive: str, negative: str) -> str:
    return f"{abs(value)}°{positive if value > 0 else negative if value < 0 else ''}"


def _bands(draw: Any, bands: npt.NDArray[np.float64]) -> None:
    """A bar for each band, level with it on the map."""
    left = LEFT + MAP[0] + GAP
    high = MAP[1] / len(bands)
    draw.text((left, TOP - 30), "land by latitude", INK, _font(18))
    for k, fraction in enumerate(bands):
        top = TOP + k * high
        box = (left, top + 4, left + PANEL, top + high - 4)
        draw.rectangle(box, (228, 232, 232))
        if fraction > 0:
            filled = (*box[:2], left + max(1.0, PANEL * float(fraction)), box[3])
            draw.rectangle(filled, STOPS[-1][1])
        over = fraction > 0.75
        x = left + PANEL * float(fraction) + (-8 if over else 8)
        draw.text(
            (x, top + high / 2), percent(fraction), PAPER if over else INK, _font(16), anchor="rm" if over else "lm"
        )


def _legend(draw: Any) -> None:
    wide, y = 300, TOP + MAP[1] + 40
    draw.rectangle((LEFT, y, LEFT + 24, y + 16), DEEP)
    draw.text((LEFT + 32, y + 8), "sea, lighter near land", INK, _font(16), anchor="lm")
    left = LEFT + 240
    for i, colour in enumerate(_land_colours(np.linspace(0, 1, wide)).round().astype(int).tolist()):
        draw.line((left + i, y, left + i, y + 16), tuple(colour))
    for text, x in (("0", left), ("50", left + wide / 2), ("100 % land", left + wide)):
        draw.text((x, y + 22), text, FAINT, _font(14), anchor="ma")
