"""Draw the pictures of the READMEs from the source: ``make pictures``."""

from collections.abc import Callable, Mapping
from pathlib import Path

from pictures import layers, route
from pictures.modules import ROOT

PICTURES: Mapping[str, Callable[[Path], str]] = {  # below the repository's root -> what draws it
    "toolkit/layers.svg": layers.make,
    "toolkit/route.svg": route.make,
}


def main() -> None:
    """Write every picture."""
    for name, make in PICTURES.items():
        (ROOT / name).write_text(make(ROOT), encoding="utf-8")
        print(name)


if __name__ == "__main__":
    main()
