"""How much faster is `infer` because reading, running and writing overlap? Against the simple loop, in turn.

    python benchmarks/bench_infer_pipeline.py --bundle model.medseg --volume ct.nii.gz [--pictures 200] [--rounds 5]

The pictures are slices of the volume, windowed to 8 bits and stored as PNG files of 512 x 512 pixels. Both ways write
masks, records and the table of areas, into a new folder each time; their masks must be the same byte for byte. A run
is a process of its own, and so is its peak memory.
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

from medseg_trt import mask_folder
from medseg_trt.bundle import load_bundle
from medseg_trt.files import sha256
from medseg_trt.images import Image, Mask, read_image
from medseg_trt.segment import segment, steps
from medseg_trt.session import open_session
from medseg_trt.statistics import speed_interval

SIZE = (512, 512)


def simple_loop(images, session, bundle, batch, label=None):
    """Do one image after the other."""
    for image in images:
        if isinstance(image, Image):
            masks = session.masks if session.gives_masks else None
            labels = segment(session.run, image, bundle.preprocessing, batch, None, masks)
            yield image, Mask.of(image, labels, bundle.classes)
        else:
            yield image


WAYS = {"simple loop": simple_loop, "overlapping": mask_folder.segment_many}


def run_once(pipe: Any, way: str, images: Path, bundle: Path, backend: str, threads: int | None) -> None:
    """Run ``infer`` one way, and send seconds, peak memory and the masks' digests."""
    began: list[float] = []

    def started(*arguments, **named):  # the session is open then
        began.append(time.perf_counter())
        return WAYS[way](*arguments, **named)

    mask_folder.segment_many = started
    with TemporaryDirectory() as out:
        done = mask_folder.infer_to_folder(
            [images], bundle, Path(out), backend=backend, threads=threads, on_error=_fail
        )
        seconds = time.perf_counter() - began[0]
        digests = {path.name: sha256(path) for path in done.masks}
    pipe.send((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000, digests))


def in_own_process(*arguments: Any) -> tuple[float, float, dict[str, str]]:
    """Return what ``run_once`` sends."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=run_once, args=(theirs, *arguments))
    process.start()
    theirs.close()
    found = ours.recv()
    process.join()
    return found


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


def stages(images: Path, bundle_folder: Path, backend: str, threads: int | None) -> dict[str, float]:
    """Return the median milliseconds of each step of a picture in the simple loop, with nothing beside it."""
    bundle, taken = load_bundle(bundle_folder), dict[str, list[float]]()
    with open_session(bundle, backend, threads) as session, TemporaryDirectory() as out:
        for path in sorted(images.iterdir())[:30]:
            clock = [time.perf_counter()]
            image = read_image(path)
            clock.append(time.perf_counter())
            do = steps(session.run, image, bundle.preprocessing)
            inputs = do.prepare(image.pixels)
            clock.append(time.perf_counter())
            logits = do.run(inputs)
            clock.append(time.perf_counter())
            labels = do.finish(logits)
            clock.append(time.perf_counter())
            mask_folder.write_mask(Mask.of(image, labels, bundle.classes), Path(out))
            clock.append(time.perf_counter())
            for name, spent in zip(("read", "prepare", "run", "finish", "write"), np.diff(clock), strict=True):
                taken.setdefault(name, []).append(1000 * spent)
    return {name: float(np.median(each)) for name, each in taken.items()}


def to_markdown(result: Any) -> str:
    """Return the results as a page."""
    lines = ["# infer: the simple loop and the overlapping one", "", result["network"] + ".", ""]
    rows = [
        (each["what"], f"{each['simple loop']['median_s']:.2f}", f"{each['overlapping']['median_s']:.2f}",
         f"{each['speed']:.2f}x", f"{each['low']:.2f} … {each['high']:.2f}", str(each["rounds"]),
         f"{each['simple loop']['peak_mb']:.0f}", f"{each['overlapping']['peak_mb']:.0f}")
        for each in result["rows"]
    ]  # fmt: skip
    header = ("images", "simple s", "overlapping s", "speed", "90 % interval", "rounds", "simple peak MB", "peak MB")
    lines += [
        *table(header, rows),
        "",
        "All masks are the same byte for byte.",
        "",
        "One picture in the simple loop:",
        "",
    ]
    return "\n".join(
        [*lines, *table(("step", "ms"), [(name, f"{ms:.1f}") for name, ms in result["stages_ms"].items()]), ""]
    )


def main() -> None:
    """Measure and write the results."""
    parser = options(__doc__)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--volume", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=int)
    chosen = parser.parse_args()
    bundle = load_bundle(chosen.bundle)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        pictures = write_pictures(chosen.volume, bundle.preprocessing.window, folder / "pictures", chosen.pictures)
        what = {
            f"{chosen.pictures} PNG of {SIZE[0]} x {SIZE[1]}": pictures,
            f"one volume, {chosen.volume.name}": chosen.volume,
        }
        rows = []
        for name, images in what.items():
            taken: dict[str, list[tuple[float, float, dict[str, str]]]] = {way: [] for way in WAYS}
            for number in range(chosen.rounds + 1):  # the first one fills the file cache and is not counted
                for way in WAYS:
                    found = in_own_process(way, images, chosen.bundle, chosen.backend, chosen.threads)
                    if number:
                        taken[way].append(found)
            digests = [each[2] for runs in taken.values() for each in runs]
            if any(each != digests[0] for each in digests):
                raise SystemExit(f"{name}: the two ways do not give the same masks; there is no speed to report")
            seconds = {way: [[each[0]] for each in runs] for way, runs in taken.items()}
            speed = speed_interval(seconds["simple loop"], seconds["overlapping"], in_turn=True)
            rows.append({
                "what": name, "speed": speed.estimate, "low": speed.low, "high": speed.high, "rounds": speed.units,
                **{way: {"median_s": float(np.median(seconds[way])), "seconds": [each[0] for each in seconds[way]],
                         "peak_mb": max(each[1] for each in taken[way])} for way in WAYS},
            })  # fmt: skip
        with open_session(bundle, chosen.backend, chosen.threads) as session:
            network = f"{session.description} on {session.device}, images of {bundle.preprocessing.image_size}"
        spent = stages(pictures, chosen.bundle, chosen.backend, chosen.threads)
    publish("infer_pipeline", {"network": network, "rows": rows, "stages_ms": spent}, to_markdown, chosen)


def _fail(path: Path, error: Exception) -> None:
    raise SystemExit(f"{path}: {error}")


if __name__ == "__main__":
    main()
