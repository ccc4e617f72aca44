"""The outlines of labels as polygons along pixel edges, for viewers that draw polygons."""

from typing import Any

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

Point = tuple[int, int]  # x, y of a pixel's corner: (0, 0) is the upper left corner of the first pixel
RIGHT, DOWN, LEFT, UP = (1, 0), (0, 1), (-1, 0), (0, -1)


def outlines(labels: UInt8[ndarray, "slices height width"]) -> list[dict[str, Any]]:
    """Return the outlines of every label on every slice that has it.

    Polygons are closed and keep the label to their right in image coordinates (y downwards): outer borders run
    clockwise and holes counter-clockwise, so that both the nonzero and the even-odd rule fill them.
    """
    result: list[dict[str, Any]] = []
    for index, plane in enumerate(labels):
        for label in np.unique(plane[plane > 0]).tolist():
            polygons = [[list(point) for point in polygon] for polygon in trace(plane == label)]
            result.append({"slice": index, "label": label, "polygons": polygons})
    return result


def trace(region: ndarray) -> list[list[Point]]:
    """Return the borders of a region (height, width) of booleans; only corners are listed."""
    padded = np.pad(region, 1)
    inside, above, left = padded[1:-1, 1:-1], padded[:-2, 1:-1], padded[1:-1, :-2]
    below, right = padded[2:, 1:-1], padded[1:-1, 2:]
    edges: dict[Point, list[Point]] = {}  # start -> directions of the edges that leave it
    for mask, (dx, dy), direction in (
        (inside & ~above, (0, 0), RIGHT),
        (inside & ~right, (1, 0), DOWN),
        (inside & ~below, (1, 1), LEFT),
        (inside & ~left, (0, 1), UP),
    ):
        for y, x in np.argwhere(mask).tolist():
            edges.setdefault((x + dx, y + dy), []).append(direction)
    polygons: list[list[Point]] = []
    while edges:
        polygons.append(_follow(min(edges), edges))
    return polygons


def _follow(start: Point, edges: dict[Point, list[Point]]) -> list[Point]:
    """Follow edges until they close, and remove them.

    ``start`` is the leftmost point that is left, and there the uppermost: one edge leaves it.
    """
    polygon: list[Point] = []
    point, direction = start, (0, 0)
    while point != start or not polygon:
        leaving = edges[point]
        right_turn = (-direction[1], direction[0])  # keeps apart the borders of pixels that touch at a corner
        following = right_turn if right_turn in leaving else leaving[0]
        leaving.remove(following)
        if not leaving:
            del edges[point]
        if following != direction:
            polygon.append(point)
        point, direction = (point[0] + following[0], point[1] + following[1]), following
    return polygon
