"""Open a session: choose an execution of a bundle, open it with its back-end, and check its output.

Nothing falls back in silence: ``auto`` says what it chose and why, and a back-end that was named and cannot run is an
error.
"""

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np

from medseg_trt.bundles.bundle import Bundle
from medseg_trt.bundles.manifest import Execution
from medseg_trt.errors import ArtefactError, MissingExtraError, UsageError
from medseg_trt.imaging.preprocess import prepare, restore
from medseg_trt.progress import LOG
from medseg_trt.sessions.backends import BACKENDS, is_installed
from medseg_trt.sessions.base import Session
from medseg_trt.sessions.mask_probe import check_masks

GPU_MARGIN = 4  # of the golden error where numbers are rounded; a first bound, which no GPU has confirmed yet
PIXEL_DISAGREEMENT = 0.01  # share of pixels: preparing differs in the last bits, which 8-bit engines may round up
PROBE_SIZE = (173, 219)  # pixels of a generated picture: no multiple of anything


def open_session(
    bundle: Bundle, backend: str = "auto", threads: int | None = None, precision: str | None = None
) -> Session:
    """Open one of the bundle's executions, and see that it answers the golden input as it did at the build.

    Args:
        bundle: what ``load_bundle`` returned.
        backend: a key of ``BACKENDS``, or ``auto``: the fastest one of the build that is installed here.
        threads: CPU threads; None leaves it to the back-end, which takes one per physical core.
        precision: one of the bundle's; None takes the best.

    Raises:
        UsageError: there is no such back-end, or the bundle has nothing for it.
        MissingExtraError: its package is not installed.
        ArtefactError: it refuses the graph, or the network answers otherwise than when it was built.
    """
    execution = choose(bundle, backend, precision)
    session = open_execution(bundle, execution, threads)
    try:
        _check_golden(session, bundle, execution)
        check_masks(session, bundle.preprocessing, bundle.golden()[0])
        _check_device_pipeline(session, bundle)
    except BaseException:
        session.close()
        raise
    LOG.info(
        "run %s with %s on %s%s", bundle.folder, session.description, session.device,
        f" ({_reason(bundle, execution)})" if backend == "auto" else "",
    )  # fmt: skip
    LOG.info("%s", _trust(bundle))
    return session


def open_execution(bundle: Bundle, execution: Execution, threads: int | None = None) -> Session:
    """Open an execution of a bundle and ask it nothing; see ``open_session``, which does."""
    variant = bundle.variant(execution)
    if BACKENDS[execution.backend].engines:
        return _opener(execution.backend)(bundle, execution)
    return open_graph(execution.backend, bundle.folder / variant.graph, variant.precision, threads, execution.compute)


def open_graph(backend: str, path: Path, precision: str, threads: int | None, compute: str) -> Session:
    """Open an ONNX file with a back-end that runs graphs; see its module's function for the arguments and errors."""
    return _opener(backend)(path, precision, threads, compute)


def _opener(backend: str) -> Callable[..., Session]:
    return getattr(import_module(BACKENDS[backend].module), BACKENDS[backend].function)


def choose(bundle: Bundle, backend: str = "auto", precision: str | None = None) -> Execution:
    """Return the best execution of the bundle for a back-end and a precision.

    Raises:
        UsageError: there is no such back-end, or the bundle has no such execution.
        MissingExtraError: none of the back-ends that could be taken is installed.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise UsageError(f"no back-end is called {backend!r}; choose one of: auto, {', '.join(BACKENDS)}")
    on_gpu = backend != "auto" and BACKENDS[backend].gpu
    found = [
        execution
        for execution in (gpu_executions(bundle, backend) if on_gpu else bundle.content.executions)
        if backend in ("auto", execution.backend) and precision in (None, bundle.variant(execution).precision)
    ]
    if not found:
        wanted = " ".join(part for part in (backend if backend != "auto" else "", precision or "") if part)
        content = bundle.content
        known = dict.fromkeys(f"{each.backend} {bundle.variant(each).precision}" for each in content.executions)
        known |= dict.fromkeys(
            f"{each.spec.library} {content.variants[each.variant].precision}" for each in content.engines
        )
        raise UsageError(f"{bundle.folder} holds nothing for {wanted}; it holds {', '.join(known)}{_how(backend)}")
    for execution in found:
        if is_installed(execution.backend):
            return execution
    first = BACKENDS[found[0].backend]
    raise MissingExtraError(f"{first.package} is not installed. Install it: pip install 'medseg-trt[{first.extra}]'")


def _how(backend: str) -> str:
    """Say how a bundle gets engines, where it is asked for one."""
    if backend == "auto" or not BACKENDS[backend].engines:
        return ""
    return f". Build an engine: medseg-trt build --ckpt model.pt --backend {backend} --target sm86"


def gpu_executions(bundle: Bundle, backend: str) -> list[Execution]:
    """Return what a back-end of GPUs would run: the variants in a flavour that it reads, the best first.

    Where it runs engines, the variants that there is an engine of.
    They were verified with another back-end. On the GPU, rounded numbers are added up in another precision and order.
    """
    found: dict[str, Execution] = {}
    for flavour in BACKENDS[backend].flavours:
        for execution in bundle.content.executions:
            variant = bundle.variant(execution)
            if execution.compute == "fp32" and variant.flavour == flavour:
                margin = 1 if variant.precision == "fp32" else GPU_MARGIN
                found.setdefault(
                    variant.precision,
                    replace(
                        execution, backend=backend, executed=False, median_ms=None,
                        golden_error=margin * execution.golden_error,
                    ),
                )  # fmt: skip
    if BACKENDS[backend].engines:
        from medseg_trt.engines.choice import engines_of

        built = {engine.precision for engine in engines_of(bundle, backend)}
        found = {precision: execution for precision, execution in found.items() if precision in built}
    best_first = dict.fromkeys(bundle.variant(execution).precision for execution in bundle.content.executions)
    return [found[precision] for precision in best_first if precision in found]


def _reason(bundle: Bundle, chosen: Execution) -> str:
    """Say why ``auto`` took this one."""
    best = bundle.default
    if chosen is not best:
        return f"auto: {BACKENDS[best.backend].package}, the fastest at the build, is not installed here"
    if chosen.median_ms is None:
        return "auto: the only one that the bundle holds"
    return f"auto: the fastest of {len(bundle.content.executions)} at the build, {chosen.median_ms:.1f} ms an image"


def _trust(bundle: Bundle) -> str:
    """Say what is known of where a bundle comes from."""
    if bundle.signed_by is not None:
        return f"{bundle.folder} is signed with the key {bundle.signed_by}"
    return (
        f"{bundle.folder} is what its manifest says; that shows damage, not malice. "
        "With the key of who built it: --verify-key verify.pem"
    )


def _check_device_pipeline(session: Session, bundle: Bundle) -> None:
    """See that pixels that are prepared and labelled on the device give the masks that they give on the CPU."""
    pixels = np.frombuffer(np.random.default_rng(0).bytes(PROBE_SIZE[0] * PROBE_SIZE[1] * 3), np.uint8)
    pixels = pixels.reshape(1, *PROBE_SIZE, 3)
    on_device = session.device_pipeline(pixels, None)
    if on_device is None:
        return
    logits = session.run(prepare(pixels[0], bundle.preprocessing, None)[np.newaxis])
    expected = restore(logits[0], PROBE_SIZE, bundle.preprocessing, None)
    share = float((on_device(pixels)[0] != expected).mean())
    if share > PIXEL_DISAGREEMENT:
        raise ArtefactError(
            f"{session.description} on this machine gives other masks than the CPU where it prepares pixels itself "
            f"({100 * share:.1f} % of a generated picture); do not use these masks. Choose another --backend"
        )


def _check_golden(session: Session, bundle: Bundle, execution: Execution) -> None:
    inputs, expected = bundle.golden()
    found = session.run(inputs)
    error = np.abs(found - expected).max() if found.shape == expected.shape else np.inf
    if not error <= execution.golden_error:
        raise ArtefactError(
            f"{session.description} on this machine answers the bundle's golden input with logits that are off by "
            f"{error:.3g}, more than {execution.golden_error:g}; do not use these masks. Rebuild here: "
            "medseg-trt build --ckpt model.pt"
        )
