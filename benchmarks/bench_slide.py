"""How much memory and time does a large slide take, and do windows leave seams?

    python benchmarks/bench_slide.py --bundle model.medseg [--side 40000] [--height 8000] [--image ct.nii.gz]

The slide is generated: ``--image``'s middle slice, at the distance of the network's pixels where it has one, or seeded
noise, repeated in both directions, in deflated tiles of 256 x 256 pixels. ``infer --tile auto`` runs once in a process
of its own, whose peak memory and seconds are those of the whole command, from its start to the finished mask; before
it, with windows that overlap by a quarter, which take almost twice the time, a strip of the same width. Seams: a
part of the slide is segmented twice, with windows that lie half a step apart; the share of pixels with different labels
is given within 4 pixels of an edge of the first run's windows, and elsewhere, beside the share that has an organ's
label in one run at least. Networks whose output depends on the whole window differ in both places.
"""

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import tifffile
from results_file import options, publish, table

from medseg_trt.bundles.bundle import Bundle, load_bundle
from medseg_trt.imaging.images import Image, read_image
from medseg_trt.imaging.preprocess import resize
from medseg_trt.sessions.base import Session
from medseg_trt.sessions.open import open_session
from medseg_trt.tiling.segment import tiled
from medseg_trt.tiling.windows import Tiles, num_windows, starts, window_size

WHOLE = "pixels and mask as a whole MB"
STRIP_ROWS, STRIP_OVERLAP = 2000, 0.25
TILE, NEAR, PART = 256, 4, 2000  # pixels: of the slide's tiles, of an edge, and the side of the part for seams

PROGRAM = """
import atexit, itertools
from pathlib import Path
from medseg_trt.cli import main
from medseg_trt.tiling import segment
prepare, windows = segment.prepare, itertools.count()
def counting(*arguments):
    next(windows)
    return prepare(*arguments)
segment.prepare = counting
atexit.register(lambda: print(f"windows: {next(windows)}", Path("/proc/self/status").read_text()))
main()
"""


def texture(path: Path | None, network_mm: float | None) -> np.ndarray:
    """Return the pixels that are repeated (height, width), or (height, width, 3)."""
    if path is None:
        return np.random.default_rng(0).integers(0, 256, (500, 500)).astype(np.uint8)
    image = read_image(path)
    pixels = image.pixels[image.num_slices // 2]
    if network_mm is not None and image.spacing_in_plane is not None:
        size = tuple(
            round(count * distance_mm / network_mm)
            for count, distance_mm in zip(image.size, image.spacing_in_plane, strict=True)
        )
        planes = pixels.astype(np.float32).transpose(2, 0, 1)
        pixels = resize(planes, (size[0], size[1]), "linear_antialias").transpose(1, 2, 0).astype(pixels.dtype)
    return np.squeeze(pixels)


def write_slide(path: Path, repeated: np.ndarray, size: tuple[int, int]) -> None:
    """Write a slide by rows of tiles."""

    def tiles() -> Iterator[np.ndarray]:
        columns = np.arange(-(-size[1] // TILE) * TILE) % repeated.shape[1]
        for top in range(0, size[0], TILE):
            band = repeated[np.arange(top, top + TILE) % repeated.shape[0]][:, columns]
            for left in range(0, len(columns), TILE):
                yield np.ascontiguousarray(band[:, left : left + TILE])

    colours = "rgb" if repeated.ndim == 3 else "minisblack"
    how: dict[str, Any] = {"tile": (TILE, TILE), "photometric": colours, "compression": "zlib", "metadata": None}
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        file.write(tiles(), shape=(*size, *repeated.shape[2:]), dtype=repeated.dtype, **how)


def run_once(root: Path, repeated: np.ndarray, size: tuple[int, int], overlap: float, bundle: Bundle) -> dict[str, Any]:
    """Write a slide, segment it with the command, and return its seconds and peak memory."""
    slide, out = root / "slide.tif", root / "masks"
    write_slide(slide, repeated, size)
    network_mm = bundle.preprocessing.spacing_mm
    # a window is what the network takes, without resizing
    scale = [] if network_mm is None else ["--mpp", str(1000 * network_mm)]
    command = [sys.executable, "-P", "-c", PROGRAM, "infer", str(slide), "--bundle", str(bundle.folder), "-o", str(out)]
    began = time.perf_counter()
    options = ["--tile", "auto", "--overlap", str(overlap), *scale]  # it shows its progress
    done = subprocess.run([*command, *options], check=True, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - began
    peak_mb = int(done.stdout.split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    pixel_bytes = repeated.itemsize * (repeated.shape[2] if repeated.ndim == 3 else 1)
    return {
        "size": size,
        "overlap": overlap,
        "windows": int(done.stdout.split("windows:")[1].split()[0]),  # that the network was given
        "expected_windows": num_windows(size, window_size(Tiles(), bundle.preprocessing, None), overlap),
        "seconds": seconds,
        "peak_mb": peak_mb,
        "mask_mb": (out / "slide.tif").stat().st_size / 1e6,
        "whole_mb": (pixel_bytes + 1) * size[0] * size[1] / 1e6,
    }


def seams(session: Session, bundle: Bundle, repeated: np.ndarray, overlap: float) -> dict[str, float]:
    """Return the shares of pixels, near edges of windows and elsewhere, whose labels depend on where windows lie."""
    tiles = Tiles(overlap=overlap)
    window = window_size(tiles, bundle.preprocessing, None)
    shift = max(int(min(window) * (1 - overlap)) // 2, 1)
    rows = np.arange(PART + shift)
    pixels = repeated[rows % repeated.shape[0]][:, rows % repeated.shape[1]].reshape(1, len(rows), len(rows), -1)

    def labels(part: np.ndarray) -> np.ndarray:
        image = Image(path=Path("part"), pixels=part)
        return tiled(session.run, image, bundle.preprocessing, tiles)(part)[0]

    first, second = labels(pixels)[shift:, shift:], labels(pixels[:, shift:, shift:])
    differs = first != second
    edge = np.zeros(pixels.shape[1:3], bool)
    for axis, side in enumerate(window):
        for start in starts(len(rows), side, overlap):
            for position in (start, start + side):
                edge[(slice(None),) * axis + (slice(max(position - NEAR, 0), position + NEAR),)] = True
    edge = edge[shift:, shift:]
    organs = (first != 0) | (second != 0)
    return {
        "near_edges": float(differs[edge].mean()),
        "elsewhere": float(differs[~edge].mean()),
        "organs": float(organs.mean()),
    }


def markdown(result: Mapping[str, Any]) -> str:
    """Return the result as a page."""
    seam = result["seams"]
    header = ["pixels", "overlap", "windows", "seconds", "ms a window", "peak RSS MB", "mask MB", WHOLE]
    cells = [
        [
            f"{run['size'][1]} x {run['size'][0]}",
            f"{run['overlap']:g}",
            str(run["windows"]),
            f"{run['seconds']:.0f}",
            f"{1000 * run['seconds'] / run['windows']:.1f}",
            f"{run['peak_mb']:.0f}",
            f"{run['mask_mb']:.1f}",
            f"{run['whole_mb']:.0f}",
        ]
        for run in result["runs"]
    ]
    return "\n".join(
        [
            "# A large slide by rows\n",
            f"Generated slides of {result['texture']}, repeated; network {result['network']}, windows of "
            f"{result['window']} pixels. One run each, beside other work on the machine: seconds are an upper limit.\n",
            *table(header, cells),
            "",
            f"Windows with an overlap of {STRIP_OVERLAP:g}, once more half a step apart, change "
            f"{100 * seam['near_edges']:.2f} % of the labels within {NEAR} pixels of an edge of a window, and "
            f"{100 * seam['elsewhere']:.2f} % elsewhere; {100 * seam['organs']:.2f} % of {PART} x {PART} pixels have "
            "an organ's label in one of the two runs.",
            "",
        ]
    )


def main() -> None:
    """Write the slide, segment it, and look for seams."""
    parser = options(__doc__)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--side", type=int, default=40_000, help="of the slide, in pixels")
    parser.add_argument("--height", type=int, help="of the slide, in pixels, where it is not a square")
    parser.add_argument("--image", type=Path, help="its middle slice is repeated; without it, seeded noise")
    parser.add_argument("--overlap", type=float, default=0.0, help="of windows of the whole slide")
    chosen = parser.parse_args()
    bundle = load_bundle(chosen.bundle)
    repeated = texture(chosen.image, bundle.preprocessing.spacing_mm)
    asked = (((STRIP_ROWS, chosen.side), STRIP_OVERLAP), ((chosen.height or chosen.side, chosen.side), chosen.overlap))
    with open_session(bundle) as session:
        seam = seams(session, bundle, repeated, STRIP_OVERLAP)
    with TemporaryDirectory(prefix="medseg-slide-") as folder:
        runs = [run_once(Path(folder), repeated, size, overlap, bundle) for size, overlap in asked]
    result = {
        "texture": "seeded noise" if chosen.image is None else f"a slice of {chosen.image.name}",
        "network": bundle.content.model.architecture,
        "window": " x ".join(map(str, window_size(Tiles(), bundle.preprocessing, None))),
        "runs": runs,
        "seams": seam,
    }
    publish("slide", result, markdown, chosen)


if __name__ == "__main__":
    main()
