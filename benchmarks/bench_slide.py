"""How much memory and time does a large slide take, and do windows leave seams?

    python benchmarks/bench_slide.py --bundle model.medseg [--side 40000] [--image ct.nii.gz] [--overlap 0.25]

The slide is generated: ``--image``'s middle slice, or seeded noise, repeated in both directions, in deflated tiles of
256 x 256 pixels. ``infer --tile auto`` runs once in a process of its own, whose peak memory and seconds are those of
the whole command, from its start to the finished mask. Seams: a part of the slide is segmented twice, with windows that
lie half a step apart; the share of pixels with different labels is given within 4 pixels of an edge of the first run's
windows, and elsewhere. Networks whose output depends on the whole window differ in both.
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
from medseg_trt.sessions.base import Session
from medseg_trt.sessions.open import open_session
from medseg_trt.tiling.segment import tiled
from medseg_trt.tiling.windows import Tiles, starts, window_size

TILE, NEAR, PART = 256, 4, 1000  # pixels: of the slide's tiles, of an edge, and the side of the part for seams

PROGRAM = """
import atexit
from pathlib import Path
from medseg_trt.cli import main
atexit.register(lambda: print(Path("/proc/self/status").read_text()))
main()
"""


def texture(image: Path | None) -> np.ndarray:
    """Return the pixels that are repeated (height, width), or (height, width, 3)."""
    if image is None:
        return np.random.default_rng(0).integers(0, 256, (500, 500)).astype(np.uint8)
    pixels = read_image(image).pixels
    return np.squeeze(pixels[len(pixels) // 2])


def write_slide(path: Path, repeated: np.ndarray, side: int) -> None:
    """Write a square slide by rows of tiles."""

    def tiles() -> Iterator[np.ndarray]:
        columns = np.arange(-(-side // TILE) * TILE) % repeated.shape[1]
        for top in range(0, side, TILE):
            band = repeated[np.arange(top, top + TILE) % repeated.shape[0]][:, columns]
            for left in range(0, len(columns), TILE):
                yield np.ascontiguousarray(band[:, left : left + TILE])

    colours = "rgb" if repeated.ndim == 3 else "minisblack"
    how: dict[str, Any] = {"tile": (TILE, TILE), "photometric": colours, "compression": "zlib", "metadata": None}
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        file.write(tiles(), shape=(side, side, *repeated.shape[2:]), dtype=repeated.dtype, **how)


def run_once(slide: Path, bundle: Path, out: Path, overlap: float) -> dict[str, float]:
    """Segment the slide with the command, and return its seconds and peak memory."""
    command = [sys.executable, "-P", "-c", PROGRAM, "infer", str(slide), "--bundle", str(bundle), "-o", str(out)]
    began = time.perf_counter()
    options = ["--tile", "auto", "--overlap", str(overlap), "-q"]
    done = subprocess.run([*command, *options], check=True, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - began
    peak_mb = int(done.stdout.split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    return {"seconds": seconds, "peak_mb": peak_mb, "mask_mb": (out / "slide.tif").stat().st_size / 1e6}


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

    differs = labels(pixels)[shift:, shift:] != labels(pixels[:, shift:, shift:])
    edge = np.zeros(pixels.shape[1:3], bool)
    for axis, side in enumerate(window):
        for start in starts(len(rows), side, overlap):
            for position in (start, start + side):
                edge[(slice(None),) * axis + (slice(max(position - NEAR, 0), position + NEAR),)] = True
    edge = edge[shift:, shift:]
    return {"near_edges": float(differs[edge].mean()), "elsewhere": float(differs[~edge].mean())}


def markdown(result: Mapping[str, Any]) -> str:
    """Return the result as a page."""
    run, seam, side = result["run"], result["seams"], result["side"]
    cells = [[f"{side} x {side}", f"{run['seconds']:.0f}", f"{run['peak_mb']:.0f}", f"{run['mask_mb']:.1f}",
              f"{result['whole_mb']:.0f}"]]  # fmt: skip
    return "\n".join(
        [
            "# A large slide by rows\n",
            f"Generated slide of {result['texture']}, repeated; network {result['network']}, windows of "
            f"{result['window']} pixels, overlap {result['overlap']:g}. One run.\n",
            *table(["pixels", "seconds", "peak RSS MB", "mask MB", "pixels and mask as a whole MB"], cells),
            "",
            f"Windows half a step apart change {100 * seam['near_edges']:.2f} % of the labels within {NEAR} pixels of "
            f"an edge of a window, and {100 * seam['elsewhere']:.2f} % elsewhere ({PART} x {PART} pixels).",
            "",
        ]
    )


def main() -> None:
    """Write the slide, segment it, and look for seams."""
    parser = options(__doc__)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--side", type=int, default=40_000, help="of the slide, in pixels")
    parser.add_argument("--image", type=Path, help="its middle slice is repeated; without it, seeded noise")
    parser.add_argument("--overlap", type=float, default=0.25)
    chosen = parser.parse_args()
    repeated, bundle = texture(chosen.image), load_bundle(chosen.bundle)
    with TemporaryDirectory(prefix="medseg-slide-") as folder:
        slide = Path(folder) / "slide.tif"
        write_slide(slide, repeated, chosen.side)
        run = run_once(slide, chosen.bundle, Path(folder) / "masks", chosen.overlap)
    with open_session(bundle) as session:
        seam = seams(session, bundle, repeated, chosen.overlap)
    pixel_bytes = repeated.itemsize * (repeated.shape[2] if repeated.ndim == 3 else 1)
    result = {
        "side": chosen.side,
        "texture": "seeded noise" if chosen.image is None else f"a slice of {chosen.image.name}",
        "network": bundle.content.model.architecture,
        "window": " x ".join(map(str, window_size(Tiles(), bundle.preprocessing, None))),
        "overlap": chosen.overlap,
        "whole_mb": (pixel_bytes + 1) * chosen.side**2 / 1e6,
        "run": run,
        "seams": seam,
    }
    publish("slide", result, markdown, chosen)


if __name__ == "__main__":
    main()
