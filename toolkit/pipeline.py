"""The whole story in two functions: ``build`` makes a verified bundle, ``infer`` segments images with it."""

from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg_trt.bundles.bundle import DEFAULT_GRAPH, MANIFEST, Bundle, golden_input, load_bundle, seal
from medseg_trt.bundles.manifest import Manifest, Variant
from medseg_trt.errors import UsageError
from medseg_trt.files import atomic_folder, sha256
from medseg_trt.imaging.images import Mask, find_images, read_image
from medseg_trt.inference.pipelined import Failure, segment_many
from medseg_trt.progress import LOG
from medseg_trt.sessions.open import open_session
from medseg_trt.spec import BuildSpec

if TYPE_CHECKING:
    from medseg_trt.train.checkpoint import Checkpoint

PRIVATE = ("root", "manifest")  # what is known of the training images' place and names


def build(
    checkpoint: Path | str,
    spec: BuildSpec | None = None,
    output: Path | str | None = None,
    data: Path | str | None = None,
    sign_key: Path | None = None,
) -> Bundle:
    """Turn a checkpoint into a bundle, verified against PyTorch; the bundle appears whole or not at all.

    Args:
        checkpoint: a ``model.pt`` that ``train`` wrote.
        spec: how to build.
        output: the bundle's folder; None puts it beside the checkpoint, with the suffix ``.medseg``.
        data: a data folder on whose images it is verified and judged; None takes the folder that the checkpoint was
            trained on, if it is still what it was, else seeded noise.
        sign_key: a file with the private key that signs the bundle; None leaves it unsigned.

    Raises:
        UsageError: a precision that does not exist or lacks calibration images, ``output`` is no bundle, or
            ``sign_key`` no key.
        AccuracyGateError: a graph does not answer as PyTorch does.
        ArtefactError: the checkpoint cannot be used.
    """
    from medseg_trt.building.contract import Contract
    from medseg_trt.building.executions import GRAPH_OF, default_graph, try_executions
    from medseg_trt.building.reference import Reference
    from medseg_trt.building.reference_images import reference_images
    from medseg_trt.building.variants import make_variants
    from medseg_trt.bundles.signature import read_private_key, sign
    from medseg_trt.engines.build import Engines, build_engines, check_engines
    from medseg_trt.engines.kernels import add_kernels
    from medseg_trt.export.fold.fold import fold, plain_report
    from medseg_trt.export.graph.fusions.fuse import fuse
    from medseg_trt.export.graph.masks import require_linear
    from medseg_trt.export.graph.trace import trace
    from medseg_trt.export.precision.quantize import parse_precision
    from medseg_trt.machine import package_versions
    from medseg_trt.train.checkpoint import load_checkpoint
    from medseg_trt.train.models.model import runner

    spec = spec or BuildSpec()
    key = read_private_key(sign_key) if sign_key is not None else None
    path = Path(checkpoint)
    folder = Path(output) if output is not None else path.with_suffix(".medseg")
    _require_replaceable(folder)
    if spec.engines is not None:
        check_engines(spec.engines, spec.outputs, spec.precisions)
    for name in spec.precisions:
        parse_precision(name)  # a typo is found now, not after minutes
    loaded = load_checkpoint(path)
    if spec.outputs == "mask":
        require_linear(loaded.preprocessing)
    images = reference_images(loaded, Path(data) if data is not None else None)
    network, contract = loaded.model(), Contract.of(loaded)
    reference = Reference(network=runner(network), contract=contract, images=images, spec=spec)

    folded, report = fold(network)
    folding = plain_report(report)
    LOG.info("verify the folded network (%s)", ", ".join(f"{each.count} {rule}" for rule, each in report.items()))
    reference.check_logits(runner(folded))
    LOG.info("trace the network to ONNX")
    graph, fused = fuse(trace(folded))
    for rule, result in fused.items():
        if result.reason:
            LOG.debug("fusion %s: %s", rule, result.reason)
    passes = {"folded": folding, "fused": {rule: result.count for rule, result in fused.items()}}
    golden = golden_input(loaded.preprocessing)
    golden_logits = runner(network)(golden)
    with atomic_folder(folder) as temporary:
        variants: dict[str, Variant] = {}
        for name in dict.fromkeys(GRAPH_OF.get(name, name) for name in spec.precisions):
            variants |= make_variants(
                graph, temporary, name, passes, contract=contract, outputs=spec.outputs, reference=reference
            )
        tried = try_executions(temporary, variants, spec, reference, (golden, golden_logits))
        engines = Engines(built=(), dropped=())
        if spec.engines is not None:
            engines = build_engines(temporary, variants, tried.verified, spec.engines, spec.precisions)
            without = add_kernels(temporary, spec.engines)
            engines = replace(engines, dropped=(*engines.dropped, *without))
        manifest = Manifest(
            model=loaded.spec,
            preprocessing=loaded.preprocessing,
            classes=loaded.classes,
            build=spec,
            source=_source(loaded, path),
            versions=package_versions(),
            variants=variants,
            executions=tried.executions,
            engines=engines.built,
            dropped=(*tried.dropped, *engines.dropped),
        )
        default = default_graph(tried.executions, variants)
        if default is None:
            LOG.warning("ONNX Runtime was verified with no graph, so there is no %s for other tools", DEFAULT_GRAPH)
        seal(temporary, manifest, golden_logits, default)
        if key is not None:
            sign(temporary / MANIFEST, key)
    best = tried.executions[0]
    LOG.info(
        "logits differ by at most %.1e, %.4f %% of the labels are the same",
        best.verification["max_abs_error"], 100 * best.verification["agreement"],
    )  # fmt: skip
    return load_bundle(folder)


def infer(
    inputs: Sequence[Path | str],
    bundle: Bundle | Path | str,
    *,
    backend: str = "auto",
    batch: int = 4,
    threads: int | None = None,
    verify_key: Path | None = None,
) -> Generator[Mask, None, None]:
    """Segment images, one after the other, and yield their masks; the next images are worked on meanwhile.

    Args:
        inputs: files and folders.
        bundle: a bundle, or its folder.
        backend: a key of ``sessions.backends.BACKENDS``, or ``auto``.
        batch: how many slices go through the network at once.
        threads: CPU threads; None leaves it to the back-end.
        verify_key: the public key of who built the bundle, where ``bundle`` is a folder; None checks digests alone.

    Raises:
        InputError: a file cannot be used.
        ArtefactError: the bundle cannot be used.
    """
    opened = bundle if isinstance(bundle, Bundle) else load_bundle(bundle, verify_key)
    sources = find_images([Path(each) for each in inputs])
    with open_session(opened, backend, threads) as session:
        for segmented in segment_many(map(read_image, sources), session, opened, batch):
            if isinstance(segmented, Failure):
                raise segmented.error
            yield segmented[1]


def _require_replaceable(folder: Path) -> None:
    if folder.exists() and not (folder / MANIFEST).is_file():
        raise UsageError(f"{folder} exists and is no bundle, so it is not replaced; choose another name with -o")


def _source(checkpoint: "Checkpoint", path: Path) -> dict[str, Any]:
    """Say where the bundle came from, without the place and the names of the training images."""
    provenance = dict(checkpoint.provenance)
    if provenance.get("data"):
        provenance["data"] = {name: value for name, value in provenance["data"].items() if name not in PRIVATE}
    options = provenance.get("recipe", {}).get("data")
    if options and options["manifest"]:
        named = {**options, "manifest": Path(options["manifest"]).name}
        provenance["recipe"] = {**provenance["recipe"], "data": named}
    return {
        "checkpoint": path.name,
        "sha256": sha256(path),
        "block_sha256": checkpoint.block_sha256,
        "provenance": provenance,
    }
