"""Does `infer` over a tree of many images keep its memory, its speed and its bytes?

    python benchmarks/bench_archive.py --bundle model.medseg [--pictures 20000] [--series 200]
    python benchmarks/bench_archive.py --bundle model.medseg --speed [--rounds 7]

The pictures (PNG, 64 x 64, generated) lie in a tree of 100 to a folder, and once more in one flat folder; the series
(DICOM, 20 generated slices of 64 x 64) lie in the tree alone. Every run is a process of its own. Memory: the peak of a
run over a tenth of the tree and over all of it. Bytes: a run that is killed in the middle and resumed gives the files
of one that was not.

``--speed`` measures something else, in a result of its own: pictures per second of the tree without series and of the
flat folder, from the open session to the end, in interleaved rounds, and the seconds of indexing apart. A mask and its
record are each flushed to the disk before the next one, which takes longer than all the rest and scatters, in both
ways alike. So the processor time of a picture is compared as well, which shows what the tree adds.
"""

import hashlib
import os
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from results_file import options, publish, table

from medseg_trt import pipeline
from medseg_trt.archive.mask_tree import MaskTree
from medseg_trt.archive.request import ArchiveRequest
from medseg_trt.bundles.bundle import Bundle, load_bundle
from medseg_trt.errors import InputError
from medseg_trt.imaging.images import Source
from medseg_trt.inference.to_folder import MaskFolder
from medseg_trt.metrics.intervals import median_of_rounds, speed_interval
from medseg_trt.processes import process_memory

SIDE, IN_FOLDER, DIFFERENT, SLICES = 64, 100, 64, 20
PICTURES, SPEED_PICTURES = 20_000, 600
RECORDS = ".finished"


@dataclass(frozen=True, kw_only=True, slots=True)
class Timed:
    """One run."""

    seconds: float  # from the open session to the end
    cpu_seconds: float  # of all threads, over the same time
    index_seconds: float
    peak_mb: float
    masks: int
    kept: int


def run_once(pipe: Any, images: Path, out: Path, bundle: Path, backend: str, tree: bool, resume: bool) -> None:
    """Run ``infer`` once and send a ``Timed``."""
    began, run = [clocks()], pipeline.segment_many

    def started(*arguments: Any, **named: Any) -> Any:  # the session is open then
        began.append(clocks())
        return run(*arguments, **named)

    make = MaskTree.find_sources

    def indexed(self: MaskTree, inputs: Sequence[Path], bundle: Bundle) -> Sequence[Source]:
        start = time.perf_counter()
        sources = make(self, inputs, bundle)
        index_seconds.append(time.perf_counter() - start)
        return sources

    index_seconds: list[float] = []
    pipeline.segment_many, MaskTree.find_sources = started, indexed
    request = ArchiveRequest()
    written = MaskTree(out, request, resume=resume, on_error=_fail) if tree else MaskFolder(out, on_error=_fail)
    for _ in pipeline.infer([images], bundle, backend=backend, destination=written):
        pass
    seconds, cpu_seconds = (end - start for start, end in zip(began[-1], clocks(), strict=True))
    timed = Timed(
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        index_seconds=index_seconds[0] if index_seconds else 0.0,
        peak_mb=process_memory()["peak_resident_mb"],
        masks=written.num_masks,
        kept=written.kept,
    )
    pipe.send(timed)


def clocks() -> tuple[float, float]:
    """Return the seconds of the clock and of the processor."""
    return time.perf_counter(), time.process_time()


def in_own_process(*arguments: Any, kill_after: int | None = None) -> Timed | None:
    """Return what ``run_once`` sends; None if the process was killed after so many masks."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=run_once, args=(theirs, *arguments))
    process.start()
    theirs.close()
    records = Path(arguments[1]) / RECORDS
    while kill_after is not None and process.is_alive():
        if sum(len(files) for _, _, files in os.walk(records)) >= kill_after:
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
            return None
        time.sleep(0.2)
    timed = ours.recv()
    process.join()
    return timed


def write_tree(root: Path, pictures: int, series: int) -> Path:
    """Write the pictures of a tree, as links to a few different files, and its series."""
    import PIL.Image

    random = np.random.default_rng(0)
    store = root.parent / "store"
    if not store.exists():
        store.mkdir()
        for number in range(DIFFERENT):
            pixels = random.integers(0, 256, (SIDE // 8, SIDE // 8), np.uint8)
            PIL.Image.fromarray(pixels).resize((SIDE, SIDE)).save(store / f"{number}.png")
    for number in range(pictures):
        folder = root / f"patient{number // (10 * IN_FOLDER):03}" / f"study{number // IN_FOLDER % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        os.link(store / f"{number % DIFFERENT}.png", folder / f"image{number:06}.png")
    for number in range(series):
        write_series(root / f"patient{number // 10:03}" / f"ct{number % 10}", number)
    return root


def write_series(folder: Path, number: int) -> None:
    """Write a series of generated CT slices."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    folder.mkdir(parents=True)
    volume = np.random.default_rng(number).integers(-1000, 1000, (SLICES, SIDE, SIDE)).astype(np.int16)
    series = f"1.2.3.{number}"
    for index, pixels in enumerate(volume):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[series, str(index)])
        file = FileDataset(folder / f"{index:04}", {}, file_meta=meta, preamble=b"\0" * 128)
        file.SOPClassUID, file.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        file.PatientID, file.StudyInstanceUID, file.SeriesInstanceUID = f"P{number // 10}", series, series
        file.Modality, file.SeriesNumber, file.Rows, file.Columns = "CT", number, SIDE, SIDE
        file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
        file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 16, 16, 15, 1
        file.ImageOrientationPatient, file.PixelSpacing = [1, 0, 0, 0, 1, 0], [1, 1]
        file.ImagePositionPatient, file.SliceThickness = [0, 0, 2 * index], 2
        file.PixelData = pixels.tobytes()
        file.save_as(folder / f"{index:04}", enforce_file_format=True)


def flat_copy(tree: Path, flat: Path) -> Path:
    """Link all pictures of a tree into one folder."""
    flat.mkdir()
    for path in tree.rglob("*.png"):
        os.link(path, flat / path.name)
    return flat


def digest(folder: Path, names_only: bool = False) -> str:
    """Return the SHA-256 of all masks and tables, or of masks by their last names."""
    whole = hashlib.sha256()
    paths = [path for path in folder.rglob("*") if path.is_file() and RECORDS not in path.parts]
    if names_only:
        paths = [path for path in paths if path.suffix == ".png"]
    for path in sorted(paths, key=lambda path: path.name if names_only else str(path)):
        whole.update((path.name if names_only else str(path.relative_to(folder))).encode() + path.read_bytes())
    return whole.hexdigest()


def speed(root: Path, tree: Path, chosen: Any) -> dict[str, Any]:
    """Return seconds of the tree's pictures and of the flat folder's; their masks must be the same bytes."""
    inputs = {"tree": tree, "flat": flat_copy(tree, root / "flat")}
    runs: dict[str, list[Timed]] = {name: [] for name in inputs}
    digests: dict[str, str] = {}
    for number in range(chosen.rounds):
        for name in sorted(inputs, reverse=bool(number % 2)):
            out = root / f"out_{name}"
            timed = in_own_process(inputs[name], out, chosen.bundle, chosen.backend, name == "tree", False)
            assert timed is not None
            runs[name].append(timed)
            digests[name] = digest(out, names_only=True)
            shutil.rmtree(out)
    seconds = {name: [[run.seconds] for run in timed] for name, timed in runs.items()}
    cpu_seconds = {name: [[run.cpu_seconds] for run in timed] for name, timed in runs.items()}
    return {
        "pictures": chosen.pictures,
        "seconds": {name: [run.seconds for run in timed] for name, timed in runs.items()},
        "cpu_seconds": {name: [run.cpu_seconds for run in timed] for name, timed in runs.items()},
        "typical_s": {name: median_of_rounds(rows) for name, rows in seconds.items()},
        "typical_cpu_s": {name: median_of_rounds(rows) for name, rows in cpu_seconds.items()},
        "index_s": [run.index_seconds for run in runs["tree"]],
        "peak_mb": {name: max(run.peak_mb for run in timed) for name, timed in runs.items()},
        "speed": asdict(speed_interval(seconds["flat"], seconds["tree"], interleaved=True)),
        "cpu_speed": asdict(speed_interval(cpu_seconds["flat"], cpu_seconds["tree"], interleaved=True)),
        "same_masks": digests["tree"] == digests["flat"],
    }


def memory(root: Path, chosen: Any) -> dict[str, Any]:
    """Return peaks of runs over parts of the tree, and whether a killed and resumed run wrote the same files."""
    pictures, series = chosen.pictures, chosen.series
    tenth = write_tree(root / "tenth", pictures // 10, series // 10)
    whole = write_tree(root / "whole", pictures, series)
    fixed = (chosen.bundle, chosen.backend, True)
    small = in_own_process(tenth, root / "out_tenth", *fixed, False)
    large = in_own_process(whole, root / "out", *fixed, False)
    killed = in_own_process(whole, root / "out_killed", *fixed, False, kill_after=(pictures + series) // 2)
    resumed = in_own_process(whole, root / "out_killed", *fixed, True)
    assert small is not None
    assert large is not None
    assert resumed is not None
    return {
        "pictures": pictures,
        "series": series,
        "peak_mb": {"tenth": small.peak_mb, "whole": large.peak_mb, "resumed": resumed.peak_mb},
        "index_s": {"tenth": small.index_seconds, "whole": large.index_seconds, "resumed": resumed.index_seconds},
        "seconds": {"tenth": small.seconds, "whole": large.seconds},
        "masks": large.masks,
        "killed": killed is None,
        "kept": resumed.kept,
        "same_bytes": digest(root / "out") == digest(root / "out_killed"),
    }


def memory_page(result: Any) -> str:
    """Return the peaks and the comparison of files as a page."""
    peak, index = result["peak_mb"], result["index_s"]
    names = {
        "tenth": "a tenth of the tree",
        "whole": f"{result['pictures']} pictures and {result['series']} series",
        "resumed": "the same, killed and resumed",
    }
    rows = [(text, f"{peak[name]:.0f}", f"{index[name]:.1f}") for name, text in names.items()]
    was_killed = "was killed in the middle" if result["killed"] else "ended before it was killed"
    return "\n".join(
        [
            "# infer over a tree of many images: memory and resuming",
            "",
            f"Network: {result['network']}, {result['backend']}.",
            "",
            *table(("run", "peak MB", "s to index"), rows),
            "",
            f"A run {was_killed}; resumed, it kept {result['kept']} of {result['masks']} masks, and its files are "
            f"{'byte-identical with' if result['same_bytes'] else 'DIFFERENT from'} those of an undisturbed run.",
            "",
        ]
    )


def speed_page(result: Any) -> str:
    """Return the rates as a page."""
    rows = [
        (
            text,
            f"{result['pictures'] / result['typical_s'][name]:.1f}",
            f"{1000 * result['typical_cpu_s'][name] / result['pictures']:.2f}",
            ", ".join(f"{seconds:.1f}" for seconds in result["seconds"][name]),
            f"{result['peak_mb'][name]:.0f}",
        )
        for name, text in (("flat", "one flat folder"), ("tree", "a tree, --tree"))
    ]
    header = ("the same pictures", "pictures/s", "ms of processor time a picture", "s of the rounds", "peak MB")
    wall, cpu = (
        f"{ratio['estimate']:.3f} times ({ratio['low']:.3f} … {ratio['high']:.3f})"
        for ratio in (result["speed"], result["cpu_speed"])
    )
    spread = "range of the rounds" if result["speed"]["confidence"] is None else "90 % intervals"
    return "\n".join(
        [
            "# infer over a tree of many images: speed",
            "",
            f"{result['pictures']} pictures; network: {result['network']}, {result['backend']}.",
            "",
            *table(header, rows),
            "",
            f"The tree has {wall} the pictures per second of the flat folder, and by processor time {cpu}; {spread} of "
            f"interleaved rounds, without indexing, which takes "
            f"{median_of_rounds([[seconds] for seconds in result['index_s']]):.1f} s. "
            f"Masks are {'the same' if result['same_masks'] else 'DIFFERENT'}.",
            "",
        ]
    )


def main() -> None:
    """Measure and write the results."""
    parser = options(__doc__)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--pictures", type=int, help="[default: 20000; with --speed 600]")
    parser.add_argument("--series", type=int, default=200)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--backend", default="onnxruntime")
    chosen = parser.parse_args()
    chosen.pictures = chosen.pictures or (SPEED_PICTURES if chosen.speed else PICTURES)
    fixed = {"network": load_bundle(chosen.bundle).content.model.architecture, "backend": chosen.backend}
    with TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ["XDG_CACHE_HOME"] = str(root / "cache")
        if chosen.speed:
            rates = speed(root, write_tree(root / "pictures", chosen.pictures, 0), chosen)
            publish("archive_speed", fixed | rates, speed_page, chosen)
        else:
            publish("archive", fixed | memory(root, chosen), memory_page, chosen)


def _fail(_path: Path, error: InputError) -> None:
    raise error


if __name__ == "__main__":
    main()
