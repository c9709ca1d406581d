"""Several masks in one picture: each is named, counted and drawn as the mask itself says."""

import io

import numpy as np
import pytest
from PIL import Image, ImageColor

from flashlib.course import figures
from flashlib.masks import Causal, Window

MASKS = {"past": Causal(), "near": Window(2, 2), "first row alone": Causal(offset=0)}


def test_each_panel_is_told_in_words():
    figure = figures.mask_gallery(MASKS, 4, 8, 2, 4, title="Three masks")
    assert figure.alt == (
        "Three masks. past: 4 query rows by 8 keys; 26 of 32 pairs visible (81%). Tiles of 2 x 4: 2 full, 2 partial, 0 "
        "skipped. near: 4 query rows by 8 keys; 17 of 32 pairs visible (53%). Tiles of 2 x 4: 0 full, 3 partial, 1 "
        "skipped. first row alone: 4 query rows by 8 keys; 10 of 32 pairs visible (31%). Tiles of 2 x 4: 0 full, 2 "
        "partial, 2 skipped."
    )
    assert "Tiles" not in figures.mask_gallery(MASKS, 4, 8, title="Three masks").alt


def test_the_pictures_differ_as_the_masks_do():
    visible = figures.tiles._CELL[figures.tiles.Tile.FULL, True]

    def visible_pixels(mask):
        png = figures.mask_gallery({"one": mask}, 8, 8, title="One mask").png
        picture = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
        return int((picture == ImageColor.getrgb(visible)).all(-1).sum())

    assert visible_pixels(Causal()) / visible_pixels(Window()) == pytest.approx(36 / 64, rel=0.1)


def test_more_masks_than_fit_in_a_row():
    many = {f"left {left}": Window(left, 0) for left in range(5)}
    assert (
        figures.mask_gallery(many, 6, 6, title="Five").size[1]
        > figures.mask_gallery(MASKS, 6, 6, title="Three").size[1]
    )


@pytest.mark.parametrize(
    "masks, sizes, says",
    [
        ({}, (4, 4), "masks must hold at least one mask; it is empty"),
        (MASKS, (0, 4), "q_len and kv_len must be at least 1; got 0 and 4"),
        (MASKS, (4, 4, 2), "block_q and block_k come together; got 2 and None"),
    ],
)
def test_bad_input(masks, sizes, says):
    with pytest.raises(ValueError, match=says):
        figures.mask_gallery(masks, *sizes, title="x")
