"""Choose the engine of a bundle that fits this machine, from the fingerprints beside the plans; no plan is opened."""

from medseg_trt.bundle import Bundle
from medseg_trt.errors import ArtefactError, UsageError
from medseg_trt.files import inside
from medseg_trt.fingerprint import EngineFingerprint, Here, mismatches, read_fingerprint, rebuild_hint, side_car
from medseg_trt.kernels.device import Device
from medseg_trt.kernels.nodes import NODES


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


def fitting_engine(bundle: Bundle, library: str, version: str, precision: str, device: Device) -> EngineFingerprint:
    """Return the first engine of a precision that nothing keeps from running on a device.

    Raises:
        UsageError: the bundle has none of that precision.
        ArtefactError: none fits; the message says why the first one does not.
    """
    found = [each for each in engines_of(bundle, library) if each.precision == precision]
    if not found:
        raise UsageError(
            f"{bundle.folder} holds no {precision} engine for {library}; build one: medseg-trt build --ckpt model.pt "
            f"--precision {precision} --backend {library} --target sm{device.capability}"
        )
    reasons = [mismatches(each, _here(bundle, each, library, version, device)) for each in found]
    for fingerprint, sentences in zip(found, reasons, strict=True):
        if not sentences:
            return fingerprint
    raise ArtefactError(f"{' '.join(reasons[0])} {rebuild_hint(bundle.folder)}")


def _here(bundle: Bundle, fingerprint: EngineFingerprint, library: str, version: str, device: Device) -> Here:
    content = bundle.content
    weights = next((each.weights for each in content.variants.values() if each.graph == fingerprint.graph), "")
    digests = {name: content.files[name].sha256 for name in (fingerprint.graph, weights) if name in content.files}
    major, minor = device.cuda
    return Here(
        library=library,
        version=version,
        sm=f"sm{device.capability}",
        gpu=device.name,
        cuda=f"{major}.{minor}",
        graph_sha256=digests.get(fingerprint.graph, ""),  # a graph that is not there is another one
        weights_sha256=digests.get(weights, ""),
        plugins={name: node.digest for name, node in NODES.items()},
    )
