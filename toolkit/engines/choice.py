"""Choose the engine of a bundle that fits this machine, from the fingerprints beside the plans; no plan is opened."""

from importlib.metadata import PackageNotFoundError, version

from medseg_trt.bundles.bundle import Bundle
from medseg_trt.engines.fingerprint import (
    EngineFingerprint,
    RuntimeEnvironment,
    mismatches,
    read_fingerprint,
    rebuild_hint,
    side_car,
)
from medseg_trt.engines.gpu import Gpu
from medseg_trt.errors import ArtefactError, UsageError
from medseg_trt.files import inside
from medseg_trt.kernels.device import Device
from medseg_trt.kernels.nodes import NODES
from medseg_trt.spec import CUDA_WHEELS


def engines_of(bundle: Bundle, library: str) -> list[EngineFingerprint]:
    """Return the fingerprints of the engines that a bundle has for a library.

    Raises:
        ArtefactError: a fingerprint is damaged, or that of another plan.
    """
    found: list[EngineFingerprint] = []
    for engine in bundle.content.engines:
        plan = inside(bundle.folder, engine.plan)
        fingerprint = read_fingerprint(plan)
        if fingerprint.plan != plan.name or fingerprint.sha256 != bundle.content.files[engine.plan].sha256:
            raise ArtefactError(f"{side_car(plan)} is the fingerprint of another plan; it is not to be trusted")
        found += [fingerprint] if fingerprint.library == library else []
    return found


def installed_version(library: str) -> str | None:
    """Return the version of a library without importing it, or None where it is not installed."""
    for name in (library, *(f"{library}-cu{cuda}" for cuda in CUDA_WHEELS)):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def runtime_environment(
    bundle: Bundle, fingerprint: EngineFingerprint, library_version: str | None, gpu: Gpu | None
) -> RuntimeEnvironment:
    """Say what an engine of a bundle meets on this machine."""
    content = bundle.content
    weights = next((each.weights for each in content.variants.values() if each.graph == fingerprint.graph), "")
    digests = {name: entry.sha256 for name, entry in content.files.items()}
    return RuntimeEnvironment(
        library=fingerprint.library, version=library_version, sm=gpu.sm if gpu else None,
        gpu=gpu.name if gpu else None, driver=gpu.driver if gpu else None, cuda=gpu.cuda if gpu else None,
        graph_sha256=digests.get(fingerprint.graph, ""),  # a graph that is not there is another one
        weights_sha256=digests.get(weights, ""), plugins={name: node.digest for name, node in NODES.items()},
    )  # fmt: skip


def judged_engines(
    bundle: Bundle, library: str, library_version: str | None, precision: str, gpu: Gpu | None
) -> list[tuple[EngineFingerprint, list[str]]]:
    """Return the engines of a precision, each with what keeps it from running here, in sentences.

    Raises:
        ArtefactError: a fingerprint is damaged, or that of another plan.
    """
    found = [each for each in engines_of(bundle, library) if each.precision == precision]
    return [(each, mismatches(each, runtime_environment(bundle, each, library_version, gpu))) for each in found]


def fitting_engine(
    bundle: Bundle, library: str, library_version: str, precision: str, device: Device
) -> EngineFingerprint:
    """Return the first engine of a precision that nothing keeps from running on a device.

    Raises:
        UsageError: the bundle has none of that precision.
        ArtefactError: none fits; the message says why the first one does not.
    """
    gpu = Gpu(name=device.name, sm=f"sm{device.capability}", cuda=".".join(map(str, device.cuda)), driver=None)
    found = judged_engines(bundle, library, library_version, precision, gpu)
    if not found:
        raise UsageError(
            f"{bundle.folder} holds no {precision} engine for {library}; build one: medseg-trt build --ckpt model.pt "
            f"--precision {precision} --backend {library} --target sm{device.capability}"
        )
    for fingerprint, sentences in found:
        if not sentences:
            return fingerprint
    raise ArtefactError(f"{' '.join(found[0][1])} {rebuild_hint(bundle.folder)}")
