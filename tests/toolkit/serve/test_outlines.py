"""Outlines: filled again they give the labels, corners that touch stay apart, holes run the other way."""

import numpy as np
import pytest

from medseg_trt.serve.outlines import outlines, trace


def filled(polygons, shape) -> np.ndarray:
    """Fill polygons by the even-odd rule: a pixel's centre is inside after an odd number of vertical edges."""
    crossings = np.zeros((shape[0], shape[1] + 1), int)
    for polygon in polygons:
        for (x, y), (next_x, next_y) in zip(polygon, polygon[1:] + polygon[:1], strict=True):
            assert (x == next_x) != (y == next_y), "edges are horizontal or vertical"
            if x == next_x:
                crossings[min(y, next_y) : max(y, next_y), x] += 1
    return crossings.cumsum(axis=1)[:, :-1] % 2 == 1


def area(polygon) -> float:
    """Return the signed area: positive where the polygon runs clockwise on a screen."""
    points = np.array(polygon)
    following = np.roll(points, -1, axis=0)
    return float((points[:, 0] * following[:, 1] - following[:, 0] * points[:, 1]).sum()) / 2


@pytest.mark.parametrize("seed", range(20))
def test_filling_the_outlines_gives_the_region(seed):
    region = np.random.default_rng(seed).random((9, 11)) < 0.5
    polygons = trace(region)
    np.testing.assert_array_equal(filled(polygons, region.shape), region)
    assert sum(map(area, polygons)) == region.sum()


def test_a_hole_runs_the_other_way_and_only_corners_are_listed():
    region = np.ones((5, 5), bool)
    region[2, 2] = False
    outer, hole = sorted(trace(region), key=area, reverse=True)
    assert (outer, area(hole)) == ([(0, 0), (5, 0), (5, 5), (0, 5)], -1)


def test_pixels_that_touch_at_a_corner_are_two_polygons():
    assert [area(polygon) for polygon in trace(np.eye(2, dtype=bool))] == [1, 1]


def test_outlines_list_every_label_of_every_slice():
    labels = np.zeros((2, 3, 3), np.uint8)
    labels[0, 0, 0], labels[1, 1, 1] = 2, 1
    assert [(entry["slice"], entry["label"]) for entry in outlines(labels)] == [(0, 2), (1, 1)]
