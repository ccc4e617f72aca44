"""The pipeline in two functions: ``build`` makes a verified bundle, ``infer`` segments images with it."""

from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path

from medseg_trt.bundles.bundle import DEFAULT_GRAPH, MANIFEST, Bundle, load_bundle, seal
from medseg_trt.files import atomic_folder
from medseg_trt.imaging.images import Mask
from medseg_trt.inference.destination import Destination
from medseg_trt.inference.outcomes import Refused, Segmented, Skipped
from medseg_trt.inference.pipelined import segment_many
from medseg_trt.progress import LOG, track
from medseg_trt.sessions.open import open_session
from medseg_trt.spec import BuildSpec


def build(
    checkpoint: Path | str,
    spec: BuildSpec | None = None,
    output: Path | str | None = None,
    data: Path | str | None = None,
    sign_key: Path | None = None,
) -> Bundle:
    """Turn a checkpoint into a bundle, verified against PyTorch; the bundle is written whole or not at all.

    Args:
        checkpoint: a ``model.pt`` that ``train`` wrote.
        spec: how to build.
        output: the bundle's folder; None puts it beside the checkpoint, with the suffix ``.medseg``.
        data: a data folder whose images verify, judge and calibrate the graphs; None takes the folder that the
            checkpoint was trained on if it is unchanged, else seeded noise.
        sign_key: a file with the private key that signs the bundle; None leaves it unsigned.

    Raises:
        UsageError: a precision that does not exist or lacks calibration images, ``output`` is no bundle, or
            ``sign_key`` no key.
        AccuracyGateError: a graph gives other logits or masks than PyTorch.
        ArtefactError: the checkpoint cannot be used.
    """
    from medseg_trt.building import bundle_steps as steps
    from medseg_trt.building.executions import default_graph, try_executions
    from medseg_trt.bundles.signature import read_private_key, sign
    from medseg_trt.train.checkpoint import load_checkpoint

    spec, path = spec or BuildSpec(), Path(checkpoint)
    key = read_private_key(sign_key) if sign_key is not None else None
    folder = Path(output) if output is not None else path.with_suffix(".medseg")
    steps.check_request(spec, folder)
    loaded = load_checkpoint(path)
    steps.check_outputs(loaded, spec)
    network = loaded.model()
    reference = steps.make_reference(loaded, network, spec, Path(data) if data is not None else None)
    exported = steps.export_graph(network, reference)
    golden = steps.golden_pair(loaded, network)
    with atomic_folder(folder) as temporary:
        variants = steps.write_variants(temporary, exported, spec, reference)
        tried = try_executions(temporary, variants, spec, reference, golden)
        engines = steps.add_engines(temporary, variants, tried, spec)
        manifest = steps.make_manifest(loaded, path, spec, variants, tried, engines)
        default = default_graph(tried.executions, variants)
        if default is None:
            LOG.warning("no graph was verified with ONNX Runtime, so there is no %s for other tools", DEFAULT_GRAPH)
        seal(temporary, manifest, golden[1], default)
        if key is not None:
            sign(temporary / MANIFEST, key)
    bundle = load_bundle(folder)
    figures = bundle.default.verification
    error, equal_percent = figures["max_abs_error"], 100 * figures["agreement"]
    LOG.info("logits differ by at most %.1e, %.4f %% of the labels are equal", error, equal_percent)
    return bundle


def infer(
    inputs: Sequence[Path | str],
    bundle: Bundle | Path | str,
    *,
    backend: str = "auto",
    batch: int = 4,
    threads: int | None = None,
    verify_key: Path | None = None,
    precision: str | None = None,
    rebuild: bool = False,
    destination: Destination | None = None,
) -> Generator[Mask, None, None]:
    """Segment images and yield their masks in order; the next images are processed meanwhile.

    Args:
        inputs: files and folders.
        bundle: a bundle, or its folder.
        backend: a key of ``sessions.backends.BACKENDS``, or ``auto``.
        batch: slices per run of the network.
        threads: CPU threads; None leaves it to the back-end.
        verify_key: the public key of who built the bundle, where ``bundle`` is a folder; None checks digests alone.
        precision: one of the bundle's precisions; None takes the fastest.
        rebuild: first rebuild the engines of the bundle that do not fit this machine.
        destination: writes each mask before it is yielded, for example ``MaskFolder``; None writes nothing, and the
            first file that cannot be used ends the run. Masks of an earlier run that ``destination`` keeps are not
            yielded.

    Raises:
        InputError: a file cannot be used.
        UsageError: ``backend`` or ``precision`` does not exist, or ``destination`` would overwrite an image.
        ArtefactError: the bundle cannot be used.
    """
    loaded = bundle if isinstance(bundle, Bundle) else load_bundle(bundle, verify_key)
    if rebuild:
        loaded = _with_fitting_engines(loaded)
    destination = destination or Destination()
    sources = destination.find_sources([Path(path) for path in inputs], loaded)
    label = sources[0].name if len(sources) == 1 else None  # one bar: of the files, or of the slices of a single file
    with destination.opened(), open_session(loaded, backend, threads, precision) as session:
        images = destination.read(sources, loaded, session, batch)
        tracked = track(sources, "infer") if label is None else sources
        with closing(segment_many(images, session, loaded, batch, label)) as outcomes:
            for source, outcome in zip(tracked, outcomes, strict=True):
                match outcome:
                    case Segmented(image=image, mask=mask):
                        if destination.write(source, image, mask, loaded):
                            yield mask
                    case Skipped(record=record):
                        destination.keep(source, record)
                    case Refused(error=error):
                        destination.refuse(source, error)


def _with_fitting_engines(bundle: Bundle) -> Bundle:
    """Rebuild engines; a bundle that changes is no longer the signed one, so it is returned without a signature."""
    from medseg_trt.engines.build import rebuild_engines

    rebuilt = rebuild_engines(bundle)
    return bundle if rebuilt.content == bundle.content else rebuilt
