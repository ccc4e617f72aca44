"""How much faster is `infer` with overlapping reading, running and writing than a sequential loop?

    python benchmarks/bench_infer_pipeline.py --bundle model.medseg --volume ct.nii.gz [--pictures 200] [--rounds 5]

The images are slices of the volume, windowed to 8 bits and stored as PNG files of 512 x 512 pixels. Both methods write
masks, records and the table of areas, into a new folder each time; their masks must be byte-identical. Every run is a
process of its own, and the rounds are interleaved.
"""

import resource
import time
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from results_file import options, publish, table

from medseg_trt import pipeline
from medseg_trt.bundles.bundle import load_bundle
from medseg_trt.files import sha256
from medseg_trt.imaging.images import Image, Mask, read_image
from medseg_trt.imaging.segment import segment, segmentation_stages
from medseg_trt.inference import to_folder
from medseg_trt.inference.outcomes import Segmented
from medseg_trt.machine import cores
from medseg_trt.metrics.intervals import median_of_rounds, speed_interval
from medseg_trt.sessions.open import open_session

SIZE = (512, 512)
Run = tuple[float, float, dict[str, str]]  # seconds, peak 10^6 bytes, digests of the masks


def simple_loop(images, session, bundle, batch, label=None):
    """Do one image after the other."""
    for image in images:
        if isinstance(image, Image):
            masks = session.masks if session.gives_masks else None
            labels = segment(session.run, image, bundle.preprocessing, batch, None, masks)
            yield Segmented(image, Mask.of(image, labels, bundle.classes))
        else:
            yield image


LOOPS = {"simple": simple_loop, "overlapping": pipeline.segment_many}
WAYS = {  # how, threads of the network, and whether images run beside each other where the bundle says so
    "simple loop": ("simple", None, False),
    "overlapping": ("overlapping", None, False),
    "overlapping, images beside each other": ("overlapping", None, True),
    "overlapping, --threads 1": ("overlapping", 1, False),
}


def run_once(pipe: Any, way: str, images: Path, bundle: Path, backend: str) -> None:
    """Run ``infer`` one way, and send seconds, peak memory and the masks' digests."""
    began: list[float] = []
    loop, threads, streams = WAYS[way]

    def opened(bundle, backend, threads, precision, device, num_images):
        return open_session(bundle, backend, threads, precision, device, num_images if streams else 1)

    def started(*arguments, **named):  # the session is open then
        began.append(time.perf_counter())
        return LOOPS[loop](*arguments, **named)

    pipeline.segment_many, pipeline.open_session = started, opened
    with TemporaryDirectory() as out:
        done = to_folder.MaskFolder(Path(out), on_error=_fail)
        for _ in pipeline.infer([images], bundle, backend=backend, threads=threads, destination=done):
            pass
        seconds = time.perf_counter() - began[0]
        digests = {path.name: sha256(path) for path in done.masks}
    pipe.send((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000, digests))


def in_own_process(*arguments: Any) -> Run:
    """Return what ``run_once`` sends."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=run_once, args=(theirs, *arguments))
    process.start()
    theirs.close()
    result = ours.recv()
    process.join()
    return result


def write_pictures(volume: Path, window: tuple[float, float], folder: Path, count: int) -> Path:
    """Write slices of the volume as pictures."""
    import PIL.Image

    image, (low, high) = read_image(volume), window
    folder.mkdir()
    for number in range(count):
        pixels = image.pixels[number * image.num_slices // count, ..., 0].astype(np.float32)
        grey = (255 * (pixels.clip(low, high) - low) / (high - low)).round().astype(np.uint8)
        PIL.Image.fromarray(grey).resize(SIZE).save(folder / f"slice{number:04}.png")
    return folder


def stages(images: Path, bundle_folder: Path, backend: str) -> dict[str, float]:
    """Return the median milliseconds of each step of a picture in the simple loop, with nothing beside it."""
    bundle, times = load_bundle(bundle_folder), dict[str, list[float]]()
    with open_session(bundle, backend) as session, TemporaryDirectory() as out:
        for path in sorted(images.iterdir())[:30]:
            clock = [time.perf_counter()]
            image = read_image(path)
            clock.append(time.perf_counter())
            do = segmentation_stages(session.run, image, bundle.preprocessing)
            inputs = do.prepare(image.pixels)
            clock.append(time.perf_counter())
            logits = do.run(inputs)
            clock.append(time.perf_counter())
            labels = do.finish(logits)
            clock.append(time.perf_counter())
            to_folder.write_mask(Mask.of(image, labels, bundle.classes), Path(out))
            clock.append(time.perf_counter())
            for name, spent in zip(("read", "prepare", "run", "finish", "write"), np.diff(clock), strict=True):
                times.setdefault(name, []).append(1000 * spent)
    return {name: float(np.median(samples)) for name, samples in times.items()}


def to_markdown(result: Any) -> str:
    """Return the results as a page."""
    rows = [
        (
            f"{row['what']}: {method}",
            f"{figures['typical_s']:.2f}",
            f"{figures['speed']:.2f}x",
            f"{figures['low']:.2f} … {figures['high']:.2f}",
            str(len(figures["seconds"])),
            f"{figures['peak_mb']:.0f}",
            "yes" if figures["same_masks"] else "no",
        )
        for row in result["rows"]
        for method, figures in row["ways"].items()
    ]
    header = ("images", "s", "speed", "90 % interval", "rounds", "peak MB", "same masks")
    spent = result["stages_ms"]
    return "\n".join(
        [
            "# infer: the simple loop and the overlapping one",
            "",
            result["network"] + ".",
            "",
            *table(header, rows),
            "",
            "Every round measures every variant; masks are compared byte for byte with the simple loop's.",
            "",
            "One picture in the simple loop, of which the network alone uses more than one core:",
            "",
            *table(("step", "ms"), [(name, f"{ms:.1f}") for name, ms in spent.items()]),
            "",
            f"If the network used {result['machine']['cores']} cores, everything else one, and nothing was lost, "
            f"overlapping would be {result['bound']:.2f} times as fast and no more.",
            "",
        ]
    )


def bound(picture_ms: float, run_ms: float, cores: int) -> float:
    """Return how many times faster overlapping can be if the network uses all cores and the rest one at a time."""
    return picture_ms / (run_ms + (picture_ms - run_ms) / cores)


def main() -> None:
    """Measure and write the results."""
    parser = options(__doc__)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--volume", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backend", default="auto")
    chosen = parser.parse_args()
    bundle = load_bundle(chosen.bundle)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        png_files = write_pictures(chosen.volume, bundle.preprocessing.window, folder / "pictures", chosen.pictures)
        inputs = {
            f"{chosen.pictures} PNG of {SIZE[0]} x {SIZE[1]}": png_files,
            f"one volume, {chosen.volume.name}": chosen.volume,
        }
        rows = []
        for name, images in inputs.items():
            runs: dict[str, list[Run]] = {method: [] for method in WAYS}
            for number in range(chosen.rounds + 1):  # the first one fills the file cache and is not counted
                for method in WAYS:
                    run = in_own_process(method, images, chosen.bundle, chosen.backend)
                    if number:
                        runs[method].append(run)
            if runs["overlapping"][0][2] != runs["simple loop"][0][2]:
                raise SystemExit(f"{name}: the two methods give different masks; no speed is reported")
            simple = runs["simple loop"]
            rows.append({"what": name, "ways": {method: figures(runs[method], simple) for method in WAYS}})
        with open_session(bundle, chosen.backend) as session:
            network = f"{session.description} on {session.device}, images of {bundle.preprocessing.image_size}"
        spent = stages(png_files, chosen.bundle, chosen.backend)
    png_ms = 1000 * rows[0]["ways"]["simple loop"]["typical_s"] / chosen.pictures
    highest = bound(png_ms, spent["run"], cores())
    result = {"network": network, "rows": rows, "stages_ms": spent, "picture_ms": png_ms, "bound": highest}
    publish("infer_pipeline", result, to_markdown, chosen)


def figures(runs: list[Run], simple: list[Run]) -> dict[str, Any]:
    """Sum up the runs of one way, against the simple loop's of the same rounds."""
    seconds, simple_seconds = ([[run[0]] for run in taken] for taken in (runs, simple))
    speed = speed_interval(simple_seconds, seconds, interleaved=True)
    return {
        "typical_s": median_of_rounds(seconds),
        "seconds": [run[0] for run in runs],
        "speed": speed.estimate,
        "low": speed.low,
        "high": speed.high,
        "peak_mb": max(run[1] for run in runs),
        "same_masks": all(run[2] == simple[0][2] for run in runs),
    }


def _fail(path: Path, error: Exception) -> None:
    raise SystemExit(f"{path}: {error}")


if __name__ == "__main__":
    main()
