"""Images of all rows in one tensor: whose they are, so that each goes with its row."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from tracekit.errors import UnsupportedError

# What has an entry for each image, or for each patch of one, and not for each row.
_OF_IMAGES: Final = ("image_grid_thw", "image_sizes")


def repeat_images(module: Any, given: dict[str, Any], rows: int, repeats: int) -> dict[str, Tensor]:
    """Those inputs that have no axis for rows, with the images of each row `repeats` times.

    Whose an image is, the placeholders in the ids tell. Raises UnsupportedError if they do not.
    """
    pixels, grid = given.get("pixel_values"), given.get("image_grid_thw")
    if "pixel_values_videos" in given:
        raise _unknown("videos")
    if pixels is None or (grid is None and len(pixels) == rows):
        return {}
    images = _images_of_rows(module, given, pixels, grid)
    repeated = {
        name: _in_blocks(given[name], images, repeats) for name in _OF_IMAGES if name in given
    }
    patches = images if grid is None else _sums(grid.prod(-1).tolist(), images)
    return {**repeated, "pixel_values": _in_blocks(pixels, patches, repeats)}


def _images_of_rows(
    module: Any, given: dict[str, Any], pixels: Tensor, grid: Tensor | None
) -> list[int]:
    """How many images each row has."""
    config = module.config
    placeholder = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    ids = given.get("input_ids")
    if ids is None or placeholder is None:
        raise _unknown("images")
    wanted: list[int] = (ids == placeholder).sum(-1).tolist()
    if grid is None:
        sizes = [sum(wanted) // len(pixels)] * len(pixels)
    else:
        sizes = (grid.prod(-1) // config.vision_config.spatial_merge_size**2).tolist()
    return _counts(sizes, wanted)


def _counts(sizes: list[int], wanted: list[int]) -> list[int]:
    """How many of the things, one behind the other, make up each sum that is wanted."""
    left = list(sizes)
    counts: list[int] = []
    for total in wanted:
        before, found = len(left), 0
        while found < total and left:
            found += left.pop(0)
        if found != total:
            raise _unknown("images")
        counts.append(before - len(left))
    return counts


def _sums(sizes: list[int], counts: list[int]) -> list[int]:
    left = iter(sizes)
    return [sum(next(left) for _ in range(count)) for count in counts]


def _in_blocks(value: Tensor, sizes: list[int], repeats: int) -> Tensor:
    blocks = value.split(sizes)
    return torch.cat([block for block in blocks for _ in range(repeats)])


def _unknown(what: str) -> UnsupportedError:
    return UnsupportedError(
        f"the {what} of all rows are in one tensor, which does not say whose they are: generate "
        f"several sequences from one row at a time."
    )
