"""Choose the engine of a bundle that matches this machine, by the fingerprints beside the plans; no plan is opened."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from medseg_trt.bundles.bundle import Bundle
from medseg_trt.bundles.manifest import BuiltEngine
from medseg_trt.devices import CPU, ComputeDevice
from medseg_trt.engines.fingerprint import (
    EngineFingerprint,
    RuntimeEnvironment,
    metadata_path,
    mismatches,
    parse_fingerprint,
    rebuild_hint,
)
from medseg_trt.errors import ArtefactError, UsageError
from medseg_trt.gpu import Gpu, find_gpu, require_gpu
from medseg_trt.kernels.device import Device
from medseg_trt.kernels.nodes import NODES
from medseg_trt.spec import CUDA_WHEELS, LIBRARY_NAMES

GRAPHS_ON_GPU = "onnxruntime-cuda"  # runs the graphs of a bundle that has no engine for a GPU


def engines_of(bundle: Bundle, library: str) -> list[EngineFingerprint]:
    """Return the fingerprints of a bundle's engines for a library.

    Raises:
        ArtefactError: a fingerprint is damaged or belongs to another plan.
    """
    fingerprints = [fingerprint_of(bundle, engine) for engine in bundle.content.engines]
    return [fingerprint for fingerprint in fingerprints if fingerprint.library == library]


def fingerprint_of(bundle: Bundle, engine: BuiltEngine) -> EngineFingerprint:
    """Return the fingerprint of one of a bundle's engines.

    Raises:
        ArtefactError: it is damaged, belongs to another plan, or names a graph that the bundle does not have.
    """
    metadata = metadata_path(Path(engine.plan)).as_posix()
    path, content = bundle.folder / metadata, bundle.content
    fingerprint = parse_fingerprint(path, bundle.read(metadata))
    if fingerprint.plan != Path(engine.plan).name or fingerprint.sha256 != content.files[engine.plan].sha256:
        raise ArtefactError(f"{path} is the fingerprint of another plan; it is not to be trusted")
    if fingerprint.graph not in {variant.graph for variant in content.variants.values()}:
        raise ArtefactError(
            f"{path} names {fingerprint.graph}, which is no graph of the bundle; build the engine again"
        )
    return fingerprint


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


def engines_with_mismatches(
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
    candidates = engines_with_mismatches(bundle, library, library_version, precision, gpu)
    if not candidates:
        raise UsageError(
            f"{bundle.folder} holds no {precision} engine for {library}; build one: medseg-trt build "
            f"--ckpt run/best.pt --precision {precision} --backend {library} --target sm{device.capability}"
        )
    for fingerprint, reasons in candidates:
        if not reasons:
            return fingerprint
    raise ArtefactError(f"{' '.join(candidates[0][1])} {rebuild_hint(bundle.folder)}")


def has_fitting_engine(bundle: Bundle, library: str, precision: str, gpu: Gpu) -> bool:
    """Say whether a bundle has an engine of a precision that an installed library can run on a GPU.

    Raises:
        ArtefactError: a fingerprint is damaged or belongs to another plan.
    """
    version = installed_version(library)
    return version is not None and any(
        not reasons for _, reasons in engines_with_mismatches(bundle, library, version, precision, gpu)
    )


def best_on_gpu(bundle: Bundle, precision: str | None, number: int) -> tuple[str, str | None]:
    """Return the back-end and the precision for a GPU: an engine that fits it, or else ONNX Runtime with the graphs.

    Engines are taken in the order in which the build ranked their precisions.

    Raises:
        DeviceError: there is no such GPU.
    """
    gpu = require_gpu(number)
    content = bundle.content
    ranked = dict.fromkeys(content.variants[execution.variant].precision for execution in content.executions)
    for name in ranked if precision is None else (precision,):
        for library in LIBRARY_NAMES:
            if has_fitting_engine(bundle, library, name, gpu):
                return library, name
    return GRAPHS_ON_GPU, precision


def device_of_trials(device: ComputeDevice) -> ComputeDevice:
    """Return where a build tries what it has made: the GPU that is asked for, or with ``auto`` the first that is there.

    The driver is asked, not PyTorch, which may be built for CPUs alone.

    Raises:
        DeviceError: there is no such GPU.
    """
    if device.kind == "auto":
        return CPU if find_gpu() is None else ComputeDevice("cuda")
    if device.kind == "cuda":
        require_gpu(device.number)
    return device
