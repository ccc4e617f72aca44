"""Run an engine of a bundle with TensorRT or TensorRT-RTX.

A plan is code that runs as soon as it is deserialised. So its bytes are read once, their digest is compared with the
manifest's and its fingerprint with this machine, and only then does the library get them.

2-D images of 8 bits are copied to the GPU as they are and come back as masks: kernels between the copies resize,
normalise and label them. Everything else is prepared and labelled on the CPU; the description says which. One thing
differs: NaN among the logits is an error on the CPU, and background on the device, which does not check for it.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Num, UInt8
from numpy import ndarray

from medseg_trt.bundles.bundle import Bundle
from medseg_trt.bundles.manifest import ENGINES_FOLDER, Execution
from medseg_trt.engines import kernels as engine_kernels
from medseg_trt.engines.choice import fitting_engine
from medseg_trt.engines.fingerprint import EngineFingerprint
from medseg_trt.errors import ArtefactError, DeviceError, require
from medseg_trt.gpu import not_enough_memory
from medseg_trt.imaging.segment import PixelRun
from medseg_trt.kernels import load
from medseg_trt.kernels.device import Device, DeviceMemoryError, open_device
from medseg_trt.kernels.image_to_tensor import scalars as tensor_scalars
from medseg_trt.kernels.launch import CudaError, Launcher
from medseg_trt.kernels.library import FILE, FindPtx, ReadFile, open_library
from medseg_trt.kernels.logits_to_mask import scalars as mask_scalars
from medseg_trt.sessions.backends import BACKENDS
from medseg_trt.sessions.base import Session
from medseg_trt.sessions.device_times import DeviceTimes, time_overlapped
from medseg_trt.sessions.tensorrt_cache import KernelCache, cache_file
from medseg_trt.sessions.tensorrt_engine import Engine, EngineError
from medseg_trt.sessions.tensorrt_stream import InferenceRequest, InferenceStream
from medseg_trt.sessions.tensorrt_stream_pool import StreamPool
from medseg_trt.spec import LIBRARY_NAMES, Preprocessing

MAX_STREAMS = 2  # one computes while the other's thread prepares; each takes the engine's working memory once more
WARM_UPS = 2  # the first run compiles and loads, the second records


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelKernels:
    """What makes masks of pixels on the device."""

    find_ptx: FindPtx
    preprocessing: Preprocessing


class TensorRtSession(Session):
    """A TensorRT engine with its streams; threads may share it."""

    def __init__(
        self,
        engine: Engine,
        device: Device,
        backend: str,
        description: str,
        kernels: PixelKernels | None = None,
        *,
        graphs: bool = True,
        plan: Path | None = None,
        compiled: KernelCache | None = None,
    ) -> None:
        """Take an engine; it is closed with the session.

        Args:
            engine: deserialised.
            device: where it was.
            backend: a key of ``sessions.backends.BACKENDS``.
            description: for a table.
            kernels: for ``device_pipeline``; None leaves pixels to the CPU.
            graphs: whether sequences that come again are recorded as CUDA graphs.
            plan: that it was deserialised from.
            compiled: where kernels that the library compiles are kept, also those that later images asked for.
        """
        self.plan = plan
        self.backend, self.device, self.description = backend, f"GPU {device.name}", description
        self._engine, self._device, self._kernels = engine, device, kernels
        self._compiled = compiled
        self._launcher = launcher = Launcher(device, kernels.find_ptx) if kernels else Launcher(device)
        self._streams = StreamPool(lambda: InferenceStream(engine, device, launcher, graphs=graphs), MAX_STREAMS)

    def run(self, batch: Float32[ndarray, "batch 3 height width"]) -> Float32[ndarray, "batch classes height width"]:
        """Return the logits of a batch of prepared images, of any number: it is cut up, or filled up, as needed.

        Raises:
            ValueError: the batch is of another size than the network, or the session is closed.
            DeviceError: the GPU has not enough memory, or reports an error.
        """
        source, target = self._engine.input, self._engine.output
        if batch.shape[1:] != source.shape:
            raise ValueError(f"the batch is {batch.shape}, but the network takes {source.shape}")
        logits = np.empty((len(batch), *target.shape), np.float32)
        prepared = np.ascontiguousarray(batch, source.dtype)
        self._pass(prepared, logits, lambda images: InferenceRequest(images=images))
        return logits

    def time_on_device(
        self, batch: Float32[ndarray, "batch 3 height width"], duration_s: float, min_runs: int
    ) -> DeviceTimes:
        """Return the times of the network alone, by CUDA events, and its throughput in all streams; see ``Session``.

        Raises:
            DeviceError: as ``run`` does.
        """
        most = self._engine.most
        sizes = [min(most, len(batch) - start) for start in range(0, len(batch), most)]
        with self._stream_in_use() as stream:
            times = stream.time(sizes, duration_s, min_runs)
        part = np.ascontiguousarray(batch[:most], self._engine.input.dtype)
        with device_errors(self._device, self.description), self._streams.all() as streams:
            overlapped = [stream.overlapped(part) for stream in streams]
            return replace(times, images_per_s=time_overlapped(overlapped, len(part), duration_s, min_runs))

    def layer_times(self, image: Float32[ndarray, "batch 3 height width"], runs: int) -> dict[str, list[float]]:
        """Return the milliseconds of every layer of the engine in each of ``runs`` runs, by the library's own profiler.

        Args:
            image: prepared, at most as many as the engine takes at once.
            runs: how often.

        Raises:
            DeviceError: as ``run`` does.
        """
        prepared = np.ascontiguousarray(image, self._engine.input.dtype)
        with self._stream_in_use() as stream:
            return stream.watch(prepared, runs)

    def device_pipeline(
        self, pixels: Num[ndarray, "slices height width channels"], spacing_mm: tuple[float, float] | None
    ) -> PixelRun | None:
        """Return what makes masks of slices like these on the device; None where they are the CPU's affair."""
        if self._kernels is None or pixels.dtype != np.uint8:
            return None
        p, classes = self._kernels.preprocessing, self._engine.output.shape[0]
        if (
            p.spacing_mm is not None
            and spacing_mm is not None
            and not all(0 < length < np.inf for length in spacing_mm)
        ):
            return None
        height, width, channels = pixels.shape[1:]

        def request(images: int) -> InferenceRequest:
            return InferenceRequest(
                images=images,
                to_tensor=tuple(tensor_scalars(p, (images, height, width, channels), spacing_mm).items()),
                to_mask=tuple(mask_scalars(p, images, classes, (height, width), spacing_mm).items()),
            )

        try:
            request(1)
        except ValueError:  # a resizing or a size that the kernels do not know
            return None

        def masks(slices: UInt8[ndarray, "batch height width channels"]) -> UInt8[ndarray, "batch height width"]:
            labels = np.empty(slices.shape[:3], np.uint8)
            self._pass(np.ascontiguousarray(slices), labels, request)
            return labels

        return masks

    def warm_up(self) -> None:
        """Run zeros in the engine's usual batch until nothing is left to be loaded, compiled or recorded."""
        zeros = np.zeros((self._engine.usual, *self._engine.input.shape), np.float32)
        for _ in range(WARM_UPS):
            self.run(zeros)

    def close(self) -> None:
        """Wait for the threads that are in it, and free everything."""
        self._device.activate()
        self._streams.close()
        if self._compiled is not None:
            self._compiled.save()
        self._engine.close()
        self._launcher.close()

    def _pass(self, source: ndarray, output: ndarray, request: Callable[[int], InferenceRequest]) -> None:
        """Send a batch through the network in pieces that the engine takes."""
        with self._stream_in_use() as stream:
            for start in range(0, len(source), self._engine.most):
                part = slice(start, min(start + self._engine.most, len(source)))
                output[part] = stream.run(request(part.stop - part.start), source[part])

    @contextmanager
    def _stream_in_use(self) -> Generator[InferenceStream, None, None]:
        """Yield a stream that is nobody else's, with the device's context; its errors are one line."""
        with device_errors(self._device, self.description):
            self._device.activate()
            with self._streams.one() as stream:
                yield stream


@contextmanager
def device_errors(device: Device, name: str) -> Generator[None, None, None]:
    """Turn what CUDA and TensorRT say into one line.

    Raises:
        DeviceError: always when either said something.
    """
    try:
        yield
    except (CudaError, EngineError) as error:
        if isinstance(error, DeviceMemoryError) or (isinstance(error, EngineError) and error.is_memory):
            remedy = "build for smaller batches: medseg-trt build --ckpt run/best.pt --max-batch 1"
            raise not_enough_memory(name, f"{_free(device)}; {error}", remedy) from error
        raise DeviceError(f"{name}: {error}") from error


def _free(device: Device) -> str:
    try:
        return f"{device.free_bytes() / 1e6:.0f} MB are free"
    except CudaError:
        return "nobody knows how much is free"


def open_engine(bundle: Bundle, execution: Execution, cuda: int = 0) -> TensorRtSession:
    """Open the engine of a bundle that fits a GPU of this machine, by its number.

    Raises:
        MissingExtraError: TensorRT or cuda-bindings is not installed.
        DeviceError: there is no GPU, or it has too little memory.
        UsageError: the bundle has no such engine.
        ArtefactError: no engine fits, a file is not what the manifest says, or TensorRT refuses it.
    """
    library, variant = execution.backend, bundle.variant(execution)
    trt = require(BACKENDS[library].package, BACKENDS[library].extra)
    device = open_device(cuda)
    fingerprint = fitting_engine(bundle, library, trt.__version__, variant.precision, device)
    plan_name = f"{ENGINES_FOLDER}/{fingerprint.plan}"
    path, plan = bundle.folder / plan_name, bundle.read(plan_name)
    if fingerprint.plugins:
        _register_plugins(trt, bundle)
    kernels, where = _pixel_kernels(bundle, device)
    description = f"{LIBRARY_NAMES[library]} {trt.__version__} {variant.precision}, {where}"
    engine = _load(trt, bundle, fingerprint, plan, device)
    compiled = KernelCache(engine, cache_file(fingerprint.sha256, device.name))
    session = TensorRtSession(engine, device, library, description, kernels, plan=path, compiled=compiled)
    try:
        with device_errors(device, description):
            compiled.load()
            session.warm_up()
            compiled.save()
    except BaseException:
        session.close()
        raise
    return session


def _load(trt: Any, bundle: Bundle, fingerprint: EngineFingerprint, plan: bytes, device: Device) -> Engine:
    """Deserialise a plan, and give it its weights where it has none."""
    path = bundle.folder / ENGINES_FOLDER / fingerprint.plan
    try:
        engine = Engine(
            trt, fingerprint.library, plan, host_code=fingerprint.version_compatible or bool(fingerprint.plugins)
        )
        if fingerprint.stripped:
            _refit(engine, bundle, fingerprint)
    except EngineError as error:
        if error.is_memory:
            with device_errors(device, str(path)):
                raise
        raise ArtefactError(f"{path}: {error}. Build it again: medseg-trt build --ckpt run/best.pt") from error
    return engine


def _refit(engine: Engine, bundle: Bundle, fingerprint: EngineFingerprint) -> None:
    """Give a plan without weights those of its graph, which the library opens by name."""
    weights = [variant.weights for variant in bundle.content.variants.values() if variant.graph == fingerprint.graph]
    with bundle.private_copy([fingerprint.graph, *weights]) as private:
        engine.refit(private / fingerprint.graph)


def _kernel_files(bundle: Bundle) -> ReadFile:
    return lambda name: bundle.read(f"{engine_kernels.KERNELS_FOLDER}/{name}")


def _register_plugins(trt: Any, bundle: Bundle) -> None:
    from medseg_trt.kernels.plugin import register

    if f"{engine_kernels.KERNELS_FOLDER}/{FILE}" not in bundle.content.files:
        raise ArtefactError(f"{bundle.folder} has no kernels for its plugins; build it again with --plugins on")
    register(trt, open_library(bundle.folder / engine_kernels.KERNELS_FOLDER, _kernel_files(bundle)))


def _pixel_kernels(bundle: Bundle, device: Device) -> tuple[PixelKernels | None, str]:
    """Return what prepares and labels pixels on the device, or None, and in words which it is."""
    p, classes = bundle.preprocessing, bundle.content.model.num_classes
    try:
        if f"{engine_kernels.KERNELS_FOLDER}/{FILE}" not in bundle.content.files:
            raise ValueError("the bundle has no kernels for it")
        tensor_scalars(p, (1, *p.image_size, 3))
        mask_scalars(p, 1, classes, p.image_size)
        find_ptx = open_library(bundle.folder / engine_kernels.KERNELS_FOLDER, _kernel_files(bundle))
        for kernel in map(load, engine_kernels.FOR_PICTURES):
            find_ptx(kernel, kernel.entry(f"{kernel.name}_float32"), device.capability, device.cuda)
    except (ValueError, DeviceError) as obstacle:
        return None, f"images prepared and labelled on the CPU ({obstacle})"
    return PixelKernels(find_ptx=find_ptx, preprocessing=p), "8-bit images prepared and labelled on the GPU"
