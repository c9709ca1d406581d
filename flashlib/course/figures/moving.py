"""The picture in README: tiles of the forward pass, one after another. `python -m flashlib.course.figures.moving` writes it."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from flashlib.course.figures.tiles import tile_steps, tile_sweep
from flashlib.masks import Causal

__all__ = ["PICTURE", "stepping_tiles"]

PICTURE = Path(__file__).resolve().parents[3] / "docs" / "tiles.gif"
_MILLISECONDS, _PAUSE, _WIDTH = 700, 2500, 720


def stepping_tiles() -> bytes:
    """An animated GIF: causal attention over 4 x 4 tiles, a frame for each tile that is not skipped."""
    sizes = (32, 32, 8, 8)
    frames = []
    for step in range(1, len(tile_steps(*sizes, Causal())) + 1):
        frame = Image.open(io.BytesIO(tile_sweep(*sizes, step, Causal()).png)).convert("RGB")
        frame = frame.resize((_WIDTH, round(frame.height * _WIDTH / frame.width)), Image.Resampling.LANCZOS)
        frames.append(frame.quantize(64, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE))
    file = io.BytesIO()
    duration = [_MILLISECONDS] * (len(frames) - 1) + [_PAUSE]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=duration, loop=0, optimize=True)
    return file.getvalue()


if __name__ == "__main__":
    PICTURE.write_bytes(stepping_tiles())
