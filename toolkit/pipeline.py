"""The whole story in two functions: ``build`` makes a verified bundle, ``infer`` segments images with it."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg_trt.bundle import MANIFEST, Bundle, Manifest, Variant, golden_input, load_bundle, seal
from medseg_trt.errors import UsageError
from medseg_trt.files import atomic_folder, sha256
from medseg_trt.images import Image, Mask, Source, find_images, read_image
from medseg_trt.preprocess import outside_fraction
from medseg_trt.progress import LOG
from medseg_trt.segment import Run, segment
from medseg_trt.session import open_session
from medseg_trt.spec import BuildSpec, to_dict

if TYPE_CHECKING:
    from medseg_trt.train.checkpoint import Checkpoint

PRECISION = "fp32"
GOLDEN_MARGIN = 10  # another processor adds in another order, so its logits may be further off than here


def build(
    checkpoint: Path | str,
    spec: BuildSpec | None = None,
    output: Path | str | None = None,
    data: Path | str | None = None,
) -> Bundle:
    """Turn a checkpoint into a bundle, verified against PyTorch; the bundle appears whole or not at all.

    Args:
        checkpoint: a ``model.pt`` that ``train`` wrote.
        spec: how to build.
        output: the bundle's folder; None puts it beside the checkpoint, with the suffix ``.medseg``.
        data: a data folder whose images it is verified on; None takes the folder that the checkpoint was trained on, if
            it is still what it was, else seeded noise.

    Raises:
        UsageError: a precision that does not exist yet, or ``output`` is something else than a bundle.
        AccuracyGateError: the graph does not answer as PyTorch does.
        ArtefactError: the checkpoint cannot be used.
    """
    from medseg_trt.export.fold import fold
    from medseg_trt.export.trace import save_graph, trace
    from medseg_trt.export.verify import verify
    from medseg_trt.reference_images import reference_images
    from medseg_trt.report import package_versions
    from medseg_trt.sessions.onnxruntime import open_graph
    from medseg_trt.train.checkpoint import load_checkpoint
    from medseg_trt.train.model import runner

    spec = spec or BuildSpec()
    if spec.precisions != (PRECISION,):
        raise UsageError(f"--precision {','.join(spec.precisions)}: only {PRECISION} can be built so far")
    path = Path(checkpoint)
    folder = Path(output) if output is not None else path.with_suffix(".medseg")
    _require_replaceable(folder)
    loaded = load_checkpoint(path)
    inputs, images = reference_images(loaded, Path(data) if data is not None else None)
    reference = loaded.model()

    def check(run: Run, what: str) -> Mapping[str, Any]:
        LOG.info("verify %s against PyTorch on %s", what, images)
        limits = {"max_abs_error": spec.max_abs_error, "min_agreement": spec.min_agreement}
        return to_dict(verify(run, runner(reference), inputs, images, **limits))

    folded, counts = fold(reference)
    check(runner(folded), f"the folded network ({', '.join(f'{count} {rule}' for rule, count in counts.items())})")
    LOG.info("trace the network to ONNX")
    graph = trace(folded)
    graph_name, weights_name = f"{PRECISION}.onnx", f"weights-{PRECISION}.bin"
    with atomic_folder(folder) as temporary:
        save_graph(graph, temporary, graph_name, weights_name)
        with open_graph(temporary / graph_name, PRECISION, None) as session:
            verification = check(session.run, session.description)
        variant = Variant(
            precision=PRECISION,
            graph=graph_name,
            weights=weights_name,
            folded=counts,
            verification=verification,
            golden_error=GOLDEN_MARGIN * spec.max_abs_error,
        )
        manifest = Manifest(
            model=loaded.spec,
            preprocessing=loaded.preprocessing,
            classes=loaded.classes,
            build=spec,
            source=_source(loaded, path),
            versions=package_versions(),
            variants={PRECISION: variant},
            default=PRECISION,
        )
        seal(temporary, manifest, runner(reference)(golden_input(loaded.preprocessing)))
    LOG.info(
        "logits differ by at most %.1e, %.4f %% of the labels are the same",
        verification["max_abs_error"], 100 * verification["agreement"],
    )  # fmt: skip
    return load_bundle(folder)


def infer(
    inputs: Sequence[Path | str],
    bundle: Bundle | Path | str,
    *,
    backend: str = "auto",
    batch: int = 4,
    threads: int | None = None,
) -> Iterator[Mask]:
    """Segment images, one after the other, and yield their masks.

    Args:
        inputs: files and folders.
        bundle: a bundle, or its folder.
        backend: a key of ``session.BACKENDS``, or ``auto``.
        batch: how many slices go through the network at once.
        threads: CPU threads; None leaves it to the back-end.

    Raises:
        InputError: a file cannot be used.
        ArtefactError: the bundle cannot be used.
    """
    opened = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
    sources = find_images([Path(each) for each in inputs])
    with open_session(opened, backend, threads) as session:
        for source in sources:
            yield segment_file(source, session.run, opened, batch, label=None)[1]


def segment_file(source: Source, run: Run, bundle: Bundle, batch: int, label: str | None) -> tuple[Image, Mask]:
    """Read one image and segment it.

    Args:
        source: the image.
        run: the bundle's network.
        bundle: its preprocessing and classes are used.
        batch: how many slices go through the network at once.
        label: where it is given, progress over the slices is shown under this name.

    Raises:
        InputError: the file cannot be used.
    """
    image = read_image(source)
    outside = outside_fraction(image.size, bundle.preprocessing, image.spacing_in_plane)
    if outside > 0:
        LOG.warning(
            "%s: %.0f %% of every slice lies outside the network's field of view and becomes background",
            source.name, 100 * outside,
        )  # fmt: skip
    labels = segment(run, image, bundle.preprocessing, batch, label)
    return image, Mask.of(image, labels, bundle.classes)


def _require_replaceable(folder: Path) -> None:
    if folder.exists() and not (folder / MANIFEST).is_file():
        raise UsageError(f"{folder} exists and is no bundle, so it is not replaced; choose another name with -o")


def _source(checkpoint: "Checkpoint", path: Path) -> dict[str, Any]:
    """Say where the bundle came from, without the place of the training images on the disk."""
    provenance = dict(checkpoint.provenance)
    if provenance.get("data"):
        provenance["data"] = {name: value for name, value in provenance["data"].items() if name != "root"}
    return {
        "checkpoint": path.name,
        "sha256": sha256(path),
        "block_sha256": checkpoint.block_sha256,
        "provenance": provenance,
    }
