"""Choose the engine of a bundle that matches this machine, by the fingerprints beside the plans; no plan is opened."""

from importlib.metadata import PackageNotFoundError, version

from medseg_trt.bundles.bundle import Bundle
from medseg_trt.engines.fingerprint import (
    EngineFingerprint,
    RuntimeEnvironment,
    metadata_path,
    mismatches,
    read_fingerprint,
    rebuild_hint,
)
from medseg_trt.engines.gpu import Gpu
from medseg_trt.errors import ArtefactError, UsageError
from medseg_trt.files import inside
from medseg_trt.kernels.device import Device
from medseg_trt.kernels.nodes import NODES
from medseg_trt.spec import CUDA_WHEELS


def engines_of(bundle: Bundle, library: str) -> list[EngineFingerprint]:
    """Return the fingerprints of a bundle's engines for a library.

    Raises:
        ArtefactError: a fingerprint is damaged or belongs to another plan.
    """
    fingerprints: list[EngineFingerprint] = []
    for engine in bundle.content.engines:
        plan = inside(bundle.folder, engine.plan)
        fingerprint = read_fingerprint(plan)
        if fingerprint.plan != plan.name or fingerprint.sha256 != bundle.content.files[engine.plan].sha256:
            raise ArtefactError(f"{metadata_path(plan)} is the fingerprint of another plan; it is untrusted")
        if fingerprint.library == library:
            fingerprints.append(fingerprint)
    return fingerprints


def installed_version(library: str) -> str | None:
    """Return the version of a library without importing it; None: it is not installed."""
    for name in (library, *(f"{library}-cu{cuda}" for cuda in CUDA_WHEELS)):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def runtime_environment(
    bundle: Bundle, fingerprint: EngineFingerprint, library_version: str | None, gpu: Gpu | None
) -> RuntimeEnvironment:
    """Return what an engine of a bundle must match on this machine."""
    content = bundle.content
    weights = next((variant.weights for variant in content.variants.values() if variant.graph == fingerprint.graph), "")
    digests = {name: entry.sha256 for name, entry in content.files.items()}
    return RuntimeEnvironment(
        library=fingerprint.library,
        version=library_version,
        sm=gpu.sm if gpu else None,
        gpu=gpu.name if gpu else None,
        driver=gpu.driver if gpu else None,
        cuda=gpu.cuda if gpu else None,
        graph_sha256=digests.get(fingerprint.graph, ""),  # a missing graph counts as another one
        weights_sha256=digests.get(weights, ""),
        plugins={name: node.digest for name, node in NODES.items()},
    )


def judged_engines(
    bundle: Bundle, library: str, library_version: str | None, precision: str, gpu: Gpu | None
) -> list[tuple[EngineFingerprint, list[str]]]:
    """Return the engines of a precision, each with the reasons why it cannot run on this machine.

    Raises:
        ArtefactError: a fingerprint is damaged or belongs to another plan.
    """
    return [
        (fingerprint, mismatches(fingerprint, runtime_environment(bundle, fingerprint, library_version, gpu)))
        for fingerprint in engines_of(bundle, library)
        if fingerprint.precision == precision
    ]


def fitting_engine(
    bundle: Bundle, library: str, library_version: str, precision: str, device: Device
) -> EngineFingerprint:
    """Return the first engine of a precision that can run on a device.

    Raises:
        UsageError: the bundle has no engine of that precision.
        ArtefactError: no engine matches; the message gives the reasons for the first one.
    """
    gpu = Gpu(name=device.name, sm=f"sm{device.capability}", cuda=".".join(map(str, device.cuda)), driver=None)
    candidates = judged_engines(bundle, library, library_version, precision, gpu)
    if not candidates:
        raise UsageError(
            f"{bundle.folder} holds no {precision} engine for {library}; build one: medseg-trt build --ckpt model.pt "
            f"--precision {precision} --backend {library} --target sm{device.capability}"
        )
    for fingerprint, reasons in candidates:
        if not reasons:
            return fingerprint
    raise ArtefactError(f"{' '.join(candidates[0][1])} {rebuild_hint(bundle.folder)}")
