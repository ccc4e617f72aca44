"""Colours of the classes."""

from itertools import product

FIRST_COLORS = (  # black, Okabe & Ito's colour-blind-safe set without grey, which a scan hides, and a violet
    (0, 0, 0),
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
    (148, 0, 211),
)


def palette(count: int) -> tuple[tuple[int, int, int], ...]:
    """Return ``count`` colours, at most 256, that are easy to tell apart; the first is black, for the background.

    Those after ``FIRST_COLORS`` are taken from a grid without dark and greyish colours: always the colour that is
    farthest from all colours before it.
    """
    colors = list(FIRST_COLORS[:count])
    if count > len(colors):
        levels = range(60, 256, 32)
        grid = [color for color in product(levels, levels, levels) if max(color) - min(color) >= 64]
        distances = {color: min(_distance(color, other) for other in colors) for color in grid}
        while len(colors) < count:
            farthest = max(distances, key=distances.__getitem__)
            colors.append(farthest)
            distances = {color: min(old, _distance(color, farthest)) for color, old in distances.items()}
    return tuple(colors)


def _distance(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    return sum((a - b) ** 2 for a, b in zip(first, second, strict=True))
