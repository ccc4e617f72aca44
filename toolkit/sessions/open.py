"""Open a session: choose an execution of a bundle, open it with its back-end, and check its output.

Nothing falls back in silence: ``auto`` says what it chose and why, and a back-end that was named and cannot run is an
error.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np

from medseg_trt.bundles.bundle import Bundle, is_signed
from medseg_trt.bundles.manifest import Execution
from medseg_trt.devices import AUTO, ComputeDevice
from medseg_trt.errors import ArtefactError, DeviceError, MedsegError, MissingExtraError, UsageError
from medseg_trt.gpu import find_gpu
from medseg_trt.imaging.preprocess import prepare, restore
from medseg_trt.machine import cores, cpu_quota
from medseg_trt.progress import LOG
from medseg_trt.sessions.backends import BACKENDS, is_installed
from medseg_trt.sessions.base import Session
from medseg_trt.sessions.engine_cache import EngineCache
from medseg_trt.sessions.equal_bits import have_equal_bits
from medseg_trt.sessions.first_run import limited_run
from medseg_trt.sessions.mask_probe import check_masks

GPU_MARGIN = 4  # of the golden error where numbers are rounded; a first bound, which no GPU has confirmed yet
PIXEL_DISAGREEMENT = 0.01  # share of pixels: preparing differs in the last bits, which 8-bit engines may round up
MIN_IMAGES_FOR_STREAMS = 50  # fewer do not make up for opening the network twice, to compare bits
PROBE_SIZE = (173, 219)  # pixels of a generated 2-D image: no multiple of anything
MAX_REASON = 200  # characters of a library's message


def open_session(
    bundle: Bundle,
    backend: str = "auto",
    threads: int | None = None,
    precision: str | None = None,
    device: ComputeDevice = AUTO,
    num_images: int = 1,
) -> Session:
    """Open one of the bundle's executions, and check that its output for the golden input is that of the build.

    Args:
        bundle: what ``load_bundle`` returned.
        backend: a key of ``BACKENDS``, or ``auto``: the fastest one of the build that is installed here.
        threads: CPU threads; None leaves it to the back-end, which takes one per physical core, except in a container
            with a quota of processor time, which the back-ends do not see: there it is as many as the quota allows.
        precision: one of the bundle's; None takes the best.
        device: where it runs; ``auto`` leaves it to the back-end.
        num_images: that will be run. For many, as many runs may overlap as the build found to be fastest, unless the
            last bits differ here.

    Raises:
        UsageError: there is no such back-end, the bundle has nothing for it, or it does not run on the device.
        DeviceError: the device is not there.
        MissingExtraError: its package is not installed.
        ArtefactError: it refuses the graph, a file has changed, the output is another one than at the build, or opening
            and running it takes more than a network of its size does.
    """
    execution = choose(bundle, backend, precision, device)
    threads = threads or cpu_quota()
    streams = min(execution.streams, threads or cores(), cores()) if num_images >= MIN_IMAGES_FOR_STREAMS else 1

    def checked(streams: int) -> Session:
        session = open_execution(bundle, execution, threads, cuda=device.number, streams=streams)
        try:
            _check_golden(session, bundle, execution)
            check_masks(session, bundle.preprocessing, bundle.golden()[0])
            _check_device_pipeline(session, bundle)
        except BaseException:
            session.close()
            raise
        return session

    def opened() -> Session:
        alone = checked(streams=1)
        if streams == 1 or not BACKENDS[execution.backend].streams:
            return alone
        with ExitStack() as unused:
            try:
                beside = unused.enter_context(checked(streams))
                if not have_equal_bits(alone, beside, bundle.preprocessing.image_size, batch=1):
                    raise ArtefactError("it gives other last bits on fewer cores")
            except (ArtefactError, DeviceError, MemoryError) as error:  # what one image at a time does not need
                LOG.info("%s runs one image at a time: %s", alone.description, error)
                return alone
            unused.pop_all()
        alone.close()
        return beside

    if BACKENDS[execution.backend].gpu:
        session = opened()  # the libraries of a GPU are bound to one thread, and map more memory than they use
    else:
        weights = bundle.variant(execution).weights
        name = f"{bundle.folder / bundle.variant(execution).graph} with {execution.backend}"
        session = limited_run(opened, name, bundle.content.files[weights].bytes)
    reason = f" ({_reason(bundle, execution, device)})" if backend == "auto" else ""
    beside = f", {session.streams} images beside each other" if session.streams > 1 else ""
    LOG.info("run %s with %s on %s%s%s", bundle.folder, session.description, session.device, beside, reason)
    if bundle.signed_by is None and not is_signed(bundle):
        LOG.debug("the files of %s are intact; it is not signed, so its origin was not checked", bundle.folder)
    else:
        LOG.info("%s", _origin(bundle))
    return session


def open_execution(
    bundle: Bundle, execution: Execution, threads: int | None = None, *, cuda: int = 0, streams: int = 1
) -> Session:
    """Open an execution of a bundle and ask it nothing; see ``open_session``, which does.

    ``cuda`` is the number of the GPU, for a back-end that takes one; ``streams`` how many images run beside each other,
    for a back-end that has streams.
    """
    if BACKENDS[execution.backend].engines:
        return _opener(execution.backend)(bundle, execution, cuda)
    variant = bundle.variant(execution)
    with bundle.private_copy([variant.graph, variant.weights]) as private:
        try:
            return open_graph(
                execution.backend,
                private / variant.graph,
                variant.precision,
                threads,
                execution.compute_dtype,
                cuda,
                EngineCache.of(bundle, variant),
                streams,
            )
        except ArtefactError as error:  # which names the copy, and that is gone by then
            raise ArtefactError(str(error).replace(str(private), str(bundle.folder))) from error


def open_graph(
    backend: str,
    path: Path,
    precision: str,
    threads: int | None,
    compute_dtype: str,
    cuda: int = 0,
    cache: EngineCache | None = None,
    streams: int = 1,
) -> Session:
    """Open an ONNX file with a back-end that runs graphs; see its module's function for the arguments and errors."""
    kind = BACKENDS[backend]
    further = (cuda, cache) if kind.gpu else (streams,) if kind.streams else ()
    return _opener(backend)(path, precision, threads, compute_dtype, *further)


def _opener(backend: str) -> Callable[..., Session]:
    return getattr(import_module(BACKENDS[backend].module), BACKENDS[backend].function)


def choose(
    bundle: Bundle, backend: str = "auto", precision: str | None = None, device: ComputeDevice = AUTO
) -> Execution:
    """Return the best execution of the bundle for a back-end, a precision and a device.

    Raises:
        UsageError: there is no such back-end, the bundle has no such execution, or the back-end does not run there.
        DeviceError: there is no such GPU.
        MissingExtraError: none of the back-ends that could be taken is installed.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise UsageError(f"no back-end is called {backend!r}; choose one of: auto, {', '.join(BACKENDS)}")
    if backend != "auto":
        _require_on(device, backend)
    elif device.kind == "cuda":
        from medseg_trt.engines.choice import best_on_gpu

        backend, precision = best_on_gpu(bundle, precision, device.number)
    on_gpu = backend != "auto" and BACKENDS[backend].gpu
    known_executions = gpu_executions(bundle, backend) if on_gpu else bundle.content.executions
    candidates = [
        execution
        for execution in known_executions
        if backend in ("auto", execution.backend)
        and precision in (None, bundle.variant(execution).precision)
        and (backend != "auto" or _runs_on(bundle, device, execution))
    ]
    if not candidates:
        wanted = " ".join(part for part in (backend if backend != "auto" else "", precision or "") if part)
        content = bundle.content
        known = dict.fromkeys(
            f"{execution.backend} {bundle.variant(execution).precision}" for execution in content.executions
        )
        known |= dict.fromkeys(
            f"{engine.spec.library} {content.variants[engine.variant].precision}" for engine in content.engines
        )
        raise UsageError(f"{bundle.folder} holds nothing for {wanted}; it holds {', '.join(known)}{_how(backend)}")
    for execution in candidates:
        if is_installed(execution.backend):
            return execution
    first = BACKENDS[candidates[0].backend]
    raise MissingExtraError(f"{first.package} is not installed. Install it: pip install 'medseg-trt[{first.extra}]'")


def _runs_on(bundle: Bundle, device: ComputeDevice, execution: Execution) -> bool:
    """Say whether the device of an execution may be used, and is there; an engine must fit it."""
    kind = BACKENDS[execution.backend]
    if not kind.gpu:
        return True
    gpu = find_gpu(device.number) if device.gpu_allowed else None
    if gpu is None or not kind.engines:
        return gpu is not None
    from medseg_trt.engines.choice import has_fitting_engine

    return has_fitting_engine(bundle, execution.backend, bundle.variant(execution).precision, gpu)


def _require_on(device: ComputeDevice, backend: str) -> None:
    """Refuse a back-end that does not run on a device."""
    gpu = BACKENDS[backend].gpu
    if device.kind == "auto" or gpu == (device.kind == "cuda"):
        return
    runs, others = ("a GPU", "cuda") if gpu else ("the processor", "cpu")
    raise UsageError(
        f"{backend} runs on {runs}, not on --device {device}; choose --device {others}, or another back-end"
    )


def _how(backend: str) -> str:
    """Say how a bundle gets engines, where it is asked for one."""
    if backend == "auto" or not BACKENDS[backend].engines:
        return ""
    return f". Build an engine: medseg-trt build --ckpt run/best.pt --backend {backend} --target sm86"


def gpu_executions(bundle: Bundle, backend: str) -> list[Execution]:
    """Return what a back-end of GPUs would run: the variants in a dialect that it reads, the best first.

    Where it runs engines, the variants that there is an engine of.
    Those that the build verified with this back-end come as they are. The others were verified with another one: on the
    GPU, rounded numbers are added up in another precision and order.
    """
    by_precision: dict[str, Execution] = {}
    for execution in bundle.content.executions:
        if execution.backend == backend:
            by_precision.setdefault(bundle.variant(execution).precision, execution)
    for dialect in BACKENDS[backend].dialects:
        for execution in bundle.content.executions:
            variant = bundle.variant(execution)
            if execution.compute_dtype == "fp32" and variant.dialect == dialect:
                margin = 1 if variant.precision == "fp32" else GPU_MARGIN
                golden_error = margin * execution.golden_error
                candidate = replace(
                    execution, backend=backend, executed=False, median_ms=None, golden_error=golden_error
                )
                by_precision.setdefault(variant.precision, candidate)
    if BACKENDS[backend].engines:
        from medseg_trt.engines.choice import engines_of

        built = {engine.precision for engine in engines_of(bundle, backend)}
        by_precision = {name: execution for name, execution in by_precision.items() if name in built}
    best_first = dict.fromkeys(bundle.variant(execution).precision for execution in bundle.content.executions)
    return [by_precision[precision] for precision in best_first if precision in by_precision]


def _reason(bundle: Bundle, chosen: Execution, device: ComputeDevice) -> str:
    """Say why ``auto`` took this one."""
    best = bundle.default
    if device.kind == "cuda":
        kind = "an engine that fits it" if BACKENDS[chosen.backend].engines else "the bundle has no engine for it"
        return f"auto on --device {device}: {kind}"
    if chosen is not best:
        package, is_here = BACKENDS[best.backend].package, is_installed(best.backend)
        obstacle = f"does not run here with --device {device}" if is_here else "is not installed here"
        return f"auto: {package}, the fastest at the build, {obstacle}"
    if chosen.median_ms is None:
        return "auto: the only one that the bundle holds"
    return f"auto: the fastest of {len(bundle.content.executions)} at the build, {chosen.median_ms:.1f} ms an image"


def _origin(bundle: Bundle) -> str:
    """Say what is known of who built a signed bundle."""
    if bundle.signed_by is not None:
        return f"{bundle.folder} is signed with the key {bundle.signed_by}"
    return f"{bundle.folder} is signed, and its signature was not checked; to check it: --verify-key verify.pem"


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
            f"({100 * share:.1f} % of a generated 2-D image); do not use these masks. Choose another --backend"
        )


def _check_golden(session: Session, bundle: Bundle, execution: Execution) -> None:
    inputs, expected = bundle.golden()
    try:
        logits = session.run(inputs)
    except (MedsegError, MemoryError):
        raise
    except Exception as error:  # the libraries' errors have no common base but Exception
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ArtefactError(f"{session.description} cannot run {bundle.folder}: {reason[:MAX_REASON]}") from error
    error = np.abs(logits - expected).max() if logits.shape == expected.shape else np.inf
    if not error <= execution.golden_error:
        raise ArtefactError(
            f"{session.description} on this machine gives logits of the bundle's golden input that are off by "
            f"{error:.3g}, more than {execution.golden_error:g}; do not use these masks. Rebuild here: "
            "medseg-trt build --ckpt run/best.pt"
        )
