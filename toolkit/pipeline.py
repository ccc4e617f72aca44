"""The functions of the pipeline: ``build`` and ``build_onnx`` make a verified bundle, ``infer`` segments with it."""

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from medseg_trt.bundles.bundle import Bundle, golden_input, load_bundle
from medseg_trt.devices import AUTO, ComputeDevice, require_device
from medseg_trt.files import atomic_folder
from medseg_trt.imaging.images import Mask
from medseg_trt.inference.destination import Destination
from medseg_trt.inference.outcomes import Kept, Refused, Segmented, SlideSegmented
from medseg_trt.inference.pipelined import segment_many
from medseg_trt.progress import LOG, track
from medseg_trt.sessions.augmented import TTA, AugmentedSession, check_tta
from medseg_trt.sessions.base import Session
from medseg_trt.sessions.ensemble import open_ensemble
from medseg_trt.sessions.open import open_session
from medseg_trt.spec import BuildSpec
from medseg_trt.tiling.segment import check_tiles
from medseg_trt.tiling.windows import AS_RECORDED, TileChoice, Tiles, chosen_tiles, is_as_recorded, recorded_tiles


def build(
    checkpoint: Path | str,
    spec: BuildSpec | None = None,
    output: Path | str | None = None,
    data: Path | str | None = None,
    sign_key: Path | None = None,
    device: ComputeDevice = AUTO,
) -> Bundle:
    """Export a checkpoint to a bundle that is verified against PyTorch; the bundle is written atomically.

    Args:
        checkpoint: the ``best.pt`` or ``last.pt`` that ``train`` wrote.
        spec: how to build.
        output: the bundle's folder; None puts it beside the checkpoint, with the suffix ``.medseg``.
        data: a data folder whose images verify, judge and calibrate the graphs; None takes the folder that the
            checkpoint was trained on if it is unchanged, else seeded noise.
        sign_key: a file with the private key that signs the bundle; None leaves it unsigned.
        device: where PyTorch runs, and where graphs and engines that fit are tried. ``auto`` takes a GPU for what can
            use it.

    Raises:
        DeviceError: PyTorch or the driver has no such device.
        UsageError: a precision that does not exist or lacks calibration images, a block that cannot be replaced,
            ``output`` is no bundle, or ``sign_key`` no key.
        AccuracyGateError: a graph gives other logits or masks than PyTorch, or no rung of the block passes.
        ArtefactError: the checkpoint cannot be used.
    """
    from medseg_trt.building import bundle_steps as steps
    from medseg_trt.building.climb import climb
    from medseg_trt.bundles.signature import read_private_key
    from medseg_trt.train.checkpoint import load_checkpoint

    spec, path = spec or BuildSpec(), Path(checkpoint)
    folder = Path(output) if output is not None else path.with_suffix(".medseg")
    key = read_private_key(sign_key) if sign_key is not None else None
    steps.check_request(spec, folder, device)
    loaded = load_checkpoint(path)
    steps.check_outputs(loaded, spec)
    steps.check_block(loaded, spec)
    network = loaded.model()
    data_folder = Path(data) if data is not None else None
    reference = steps.make_reference(loaded, network, spec, data_folder, device)
    folded = steps.fold_network(network, reference)
    second = steps.second_images(loaded, spec, data_folder)
    ladder = steps.block_ladder(loaded, network, folded, reference, second, data_folder)
    with atomic_folder(folder) as temporary:
        deployed = climb(temporary, ladder, folded.report, reference, second, golden_input(loaded.preprocessing))
        steps.complete(temporary, loaded, path, spec, deployed, reference, key)
    return _verified(folder)


def build_onnx(
    model: Path | str,
    description: Path | str,
    spec: BuildSpec | None = None,
    output: Path | str | None = None,
    data: Path | str | None = None,
    sign_key: Path | None = None,
    device: ComputeDevice = AUTO,
) -> Bundle:
    """Make a bundle of a network that comes as an ONNX file, verified against that file in ONNX Runtime.

    Args:
        model: the ONNX file, from images (batch, 1 or 3, height, width) to logits (batch, classes, height, width).
        description: a JSON file with the fields ``preprocessing`` and ``classes``, those of the classes of that name.
        spec: as for ``build``; there is no language block to replace.
        output: as for ``build``.
        data: as for ``build``; None takes seeded noise.
        sign_key: as for ``build``.
        device: where graphs and engines are tried, as for ``build``; the file itself runs on the CPU.

    Raises:
        DeviceError: there is no such GPU.
        InputError: a file does not exist.
        UsageError: as for ``build``, or the description is of images of another size than the network's.
        AccuracyGateError: a graph gives other logits or masks than the file.
        ArtefactError: the network cannot be used, or does not fit its description.
    """
    from medseg_trt.building import bundle_steps as steps
    from medseg_trt.building.onnx_source import deploy_onnx, open_onnx, reference_of_onnx
    from medseg_trt.bundles.signature import read_private_key

    spec, path = spec or BuildSpec(), Path(model)
    folder = Path(output) if output is not None else path.with_suffix(".medseg")
    key = read_private_key(sign_key) if sign_key is not None else None
    steps.check_request(spec, folder, device)
    source = open_onnx(path, Path(description))
    steps.check_outputs(source.checkpoint, spec)
    steps.check_block(source.checkpoint, spec)
    reference = reference_of_onnx(source, spec, Path(data) if data is not None else None, device)
    with atomic_folder(folder) as temporary:
        deployed = deploy_onnx(temporary, source, reference, golden_input(source.checkpoint.preprocessing))
        steps.complete(temporary, source.checkpoint, path, spec, deployed, reference, key)
    return _verified(folder)


def _verified(folder: Path) -> Bundle:
    """Open a bundle that was just written, and say how well its default agrees with the reference."""
    bundle = load_bundle(folder)
    verification = bundle.default.verification
    error, equal_percent = verification.max_abs_error, 100 * verification.agreement
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
    ensemble: Sequence[Bundle | Path | str] = (),
    postprocess: bool = True,
    tta: str | None = None,
    tiles: TileChoice = AS_RECORDED,
    device: ComputeDevice = AUTO,
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
        ensemble: further bundles; masks are made of the mean of all logits. They prepare images as ``bundle`` does.
            Post-processing was learnt on the masks of one network, so that of an ensemble's bundles is left out.
        postprocess: correct masks by the steps that the bundle stores, if it has some.
        tta: test-time augmentation, a key of ``sessions.augmented.TTA``; None: each slice is run once.
        tiles: cut images into windows, and blend the logits where they overlap; ``AsRecorded``: if the network was
            trained on windows; None: each slice is resized as a whole. Large TIFF files, with windows and a
            ``destination`` that writes masks, are read and written by rows; their masks are in files alone, and are
            not yielded.
        device: where they run; ``auto`` leaves it to ``backend``.

    Raises:
        InputError: a file cannot be used.
        UsageError: ``backend`` or ``precision`` does not exist, ``destination`` would overwrite an image, or the
            bundles of an ensemble prepare images in different ways or know different classes.
        ArtefactError: the bundle cannot be used.
        DeviceError: the device is not there.
    """
    require_device(device)
    bundles = [item if isinstance(item, Bundle) else load_bundle(item, verify_key) for item in (bundle, *ensemble)]
    if rebuild:
        from medseg_trt.engines.rebuild import rebuild_engines

        bundles = [rebuild_engines(loaded, device.number) for loaded in bundles]
    chosen = chosen_tiles(tiles, bundles[0].tiles)
    if chosen is not None:
        check_tiles(bundles[0].preprocessing)
    loaded = _as_asked(bundles, postprocess, chosen)
    destination = destination or Destination()
    sources = destination.find_sources([Path(path) for path in inputs], loaded)
    num_images = 1 if tta is not None or chosen is not None else len(sources)  # runs of one image do not overlap
    label = sources[0].name if len(sources) == 1 else None  # one bar: of the files, or of the slices of a single file
    with (
        closing(destination),
        _open(bundles, backend, threads, precision, tta, device, num_images) as session,
        destination.opened(),  # last: a session that cannot be opened leaves nothing behind
    ):
        images = destination.read(sources, loaded, session, batch)
        tracked = track(sources, "infer") if label is None else sources
        with closing(segment_many(images, session, loaded, batch, label)) as outcomes:
            for source, outcome in zip(tracked, outcomes, strict=True):
                match outcome:
                    case Segmented(image=image, mask=mask):
                        if destination.write(source, image, mask, loaded):
                            yield mask
                    case SlideSegmented(mask=mask):
                        destination.write_slide(source, mask)
                    case Kept(record=record):
                        destination.keep(source, record)
                    case Refused(error=error):
                        destination.refuse(source, error)


def _as_asked(bundles: Sequence[Bundle], postprocess: bool, tiles: Tiles | None) -> Bundle:
    """Return the first bundle with what was asked of its masks; post-processing that cannot be applied is said."""
    preprocessing = bundles[0].preprocessing
    recorded = recorded_tiles(preprocessing)
    parts = "whole slices" if recorded is None else f"{recorded}"
    if recorded is not None and not is_as_recorded(tiles, preprocessing):
        LOG.warning(
            "the network was trained on %s, and masks are made of %s, as asked",
            *(recorded, "whole slices" if tiles is None else tiles),
        )
    is_left_out = len(bundles) > 1 or not is_as_recorded(tiles, preprocessing)
    if postprocess and is_left_out and any(bundle.postprocessing for bundle in bundles):
        LOG.warning("masks are not post-processed: the steps were learnt on one network's masks of %s", parts)
    if bundles[0].content.guard is None and any(bundle.content.guard for bundle in bundles):
        LOG.warning("images are not compared with the training images: the first bundle does not say what these were")
    raw_masks = bundles[0].raw_masks or not postprocess or len(bundles) > 1
    return replace(bundles[0], raw_masks=raw_masks, tiles=tiles)


def _open(
    bundles: Sequence[Bundle],
    backend: str,
    threads: int | None,
    precision: str | None,
    tta: str | None,
    device: ComputeDevice,
    num_images: int,
) -> Session:
    """Open one bundle, or several as an ensemble."""
    if tta is not None:
        check_tta(tta, bundles[0].preprocessing.image_size)
    if len(bundles) == 1:
        session = open_session(bundles[0], backend, threads, precision, device, num_images)
    else:
        session = open_ensemble(bundles, backend, threads, precision, device)
    if tta is None:
        return session
    LOG.info("tta %s: each slice is run %d times", tta, len(TTA[tta]))
    return AugmentedSession(session, tta, bundles[0].preprocessing.image_size)
