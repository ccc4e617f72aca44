"""Build a TensorRT engine from a graph: one code path for TensorRT-RTX and the classic library.

The precision is defined by the graph, because both libraries are strongly typed. ``LIBRARIES`` lists the differences
between them: names of GPUs and supported options. The builder writes counters of its process into the plan and sorts by
address, so builds are reproducible only in a separate process with fixed addresses.

Source: TensorRT, ``IBuilder``, ``IBuilderConfig`` and ``IProgressMonitor``; TensorRT-RTX, "CPU-Only AOT".
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

from medseg_trt.errors import ArtefactError, DeviceError, MedsegError, UsageError, require
from medseg_trt.export.tensorrt.graph import EngineGraph, engine_graph
from medseg_trt.export.tensorrt.timing_cache import load_cache, save_cache
from medseg_trt.files import atomic_file
from medseg_trt.progress import LOG
from medseg_trt.spec import CUDA_WHEELS, LIBRARY_NAMES, EngineSpec

CANONICAL_SINCE = (10, 15)  # the first classic parser that reads RMSNormalization, Attention and the rest of opset 23
LAYERS = "Layers:"  # prefix of the list of layers

OnProgress = Callable[[str, int, int], None]  # phase, steps done, steps in all


@dataclass(frozen=True, kw_only=True, slots=True)
class Library:
    """The differences between the two libraries."""

    module: str
    extra: str  # of medseg-trt that installs it
    distribution: str  # name of its wheels, followed by -cu13 or -cu12
    tool: str  # its command line tool
    cross_builds: bool  # for GPUs that this machine does not have
    refuses: Mapping[str, str]  # unsupported options of EngineSpec -> reason
    flags: tuple[str, ...] = ()  # of the builder, always set


LIBRARIES: Mapping[str, Library] = {
    "tensorrt-rtx": Library(
        module="tensorrt_rtx",
        extra="tensorrt-rtx",
        distribution="tensorrt-rtx",
        tool="tensorrt_rtx",
        cross_builds=True,
        refuses={
            "version_compatible": "it has no lean runtime; an engine is built again in seconds",
            "hardware": "name every kind of GPU instead: --target sm86,sm89,sm120",
        },
        flags=("REQUIRE_USER_ALLOCATION",),  # the engine allocates nothing while it runs, so that it can be captured
    ),
    "tensorrt": Library(
        module="tensorrt", extra="tensorrt", distribution="tensorrt", tool="trtexec", cross_builds=False, refuses={}
    ),
}
EXPLAINED: Mapping[str, str] = {  # text in the builder's log -> explanation
    "FP32 GEMM is not supported": "sm75 multiplies no float32 matrices in TensorRT-RTX, and this graph has some; "
    "build --precision fp16, or leave sm75 out",
    "within workspace limit": "no kernel fits into so little scratch memory; allow more: --workspace-gib",
    "graph_jit.cpp": "an engine without weights is compiled on the GPU itself; build it on a machine that has one, or "
    "leave --strip out",
    "out of memory": "the GPU has too little free memory to try kernels; close what else runs on it",
    "CUDA initialization failure": "the classic library builds on a machine with an NVIDIA GPU only; without one, "
    "build for TensorRT-RTX: --backend tensorrt-rtx",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class BuilderOutput:
    """The output of the builder, without the plan."""

    version: str  # of the library
    seconds: float  # of the builder only
    layers: str  # the logged list of layers; "" where there is none
    repairs: tuple[str, ...]  # changes of the copy of the graph
    plugins: Mapping[str, str]  # plugins of the engine -> digest
    command: str  # the equivalent shell command


def require_library(name: str) -> ModuleType:
    """Import a library.

    Raises:
        UsageError: there is no such library.
        MissingExtraError: it is not installed.
    """
    if name not in LIBRARIES:
        raise UsageError(f"no library is called {name!r}; choose one of: {', '.join(LIBRARIES)}")
    return require(LIBRARIES[name].module, LIBRARIES[name].extra)


def cuda_of(name: str) -> str | None:
    """Return the CUDA version that the installed library is made for, or None if its wheel does not say."""
    for number in CUDA_WHEELS:
        try:
            version(f"{LIBRARIES[name].distribution}-cu{number}")
        except PackageNotFoundError:
            continue
        return number
    return None


def dialect_for(library: str, trt_version: str) -> str:
    """Return the dialect that a version of a library reads."""
    if library == "tensorrt" and tuple(map(int, trt_version.split(".")[:2])) < CANONICAL_SINCE:
        return "plain"
    return "canonical"


def known_targets(library: str, trt: ModuleType, local_gpu: str | None) -> tuple[str, ...]:
    """Return the GPUs that a library builds for; ``local_gpu`` is that of this machine, or None."""
    if LIBRARIES[library].cross_builds:
        names = [name.lower() for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
        return tuple(sorted(names, key=lambda name: int(name.removeprefix("sm"))))
    return (local_gpu,) if local_gpu is not None else ()


def check_engine_spec(spec: EngineSpec, trt: ModuleType, local_gpu: str | None) -> None:
    """Reject a specification that the library does not support, before the build.

    Args:
        spec: of the engine.
        trt: the library.
        local_gpu: architecture of this machine's GPU, such as "sm86", or None.

    Raises:
        UsageError: an unknown GPU, or an option that the library does not have.
        DeviceError: the library builds only for the local GPU, and there is none.
    """
    name, library = LIBRARY_NAMES[spec.library], LIBRARIES[spec.library]
    known = known_targets(spec.library, trt, local_gpu)
    if not known:
        raise DeviceError(
            f"{name} builds for the GPU of the machine that it runs on, and this machine has none; "
            "build for TensorRT-RTX, which needs none: --backend tensorrt-rtx"
        )
    if unknown := [target for target in spec.targets if target not in known]:
        raise UsageError(f"{name} {trt.__version__} cannot build for {', '.join(unknown)}; it knows {', '.join(known)}")
    for option, reason in library.refuses.items():
        if getattr(spec, option) not in (False, "none"):
            raise UsageError(f"{name} has no {option.replace('_', ' ')} option: {reason}")


def build_engine(
    graph: Path, plan: Path, spec: EngineSpec, on_progress: OnProgress, cache: Path | None
) -> BuilderOutput:
    """Build one engine and write its plan atomically.

    Args:
        graph: an ONNX file with its weights in the same folder.
        plan: path of the engine.
        spec: accepted by ``check_engine_spec``.
        on_progress: called between steps of the builder; an exception in it ends the build.
        cache: timing cache of the classic library; None: no cache.

    Raises:
        ArtefactError: the library cannot read the graph.
        MedsegError: the builder fails; the message explains known causes.
    """
    trt = require_library(spec.library)
    log = _logger(trt)
    registered = _register(trt) if spec.plugins else {}
    source = engine_graph(graph, plugins=spec.plugins)
    builder = trt.Builder(log)
    builder.max_threads = 1
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(source.serialized, str(graph)):
        errors = "; ".join(_oneline(parser.get_error(index).desc()) for index in range(parser.num_errors))
        raise ArtefactError(f"{LIBRARY_NAMES[spec.library]} {trt.__version__} does not read {graph.name}: {errors}")
    if spec.max_batch == 1:
        _fix_batch(network)
    config = _config(trt, builder, spec, source)
    config.progress_monitor = _monitor(trt, on_progress)
    timings = None if LIBRARIES[spec.library].cross_builds else load_cache(config, cache)
    began = time.perf_counter()
    serialized = builder.build_serialized_network(network, config)
    seconds = time.perf_counter() - began
    if serialized is None:
        raise MedsegError(_failure(spec, trt, graph, log.messages))
    if timings is not None and cache is not None:
        save_cache(config, cache)
    with atomic_file(plan) as temporary, temporary.open("wb") as file:
        file.write(memoryview(serialized))
    used = {name: digest for name, digest in registered.items() if name in source.functions}
    return BuilderOutput(
        version=trt.__version__,
        seconds=seconds,
        layers=_layers(log.messages),
        repairs=source.repairs,
        plugins=used,
        command=shell_command(graph, plan, spec, source),
    )


def shell_command(graph: Path, plan: Path, spec: EngineSpec, source: EngineGraph) -> str:
    """Return the equivalent command of the library's tool, run in the graph's folder; it does not make the repairs."""
    library = LIBRARIES[spec.library]
    files = [f"--onnx={graph.name}", f"--saveEngine={plan.name}"]
    words = [library.tool, *files, "--skipInference", "--profilingVerbosity=detailed", "--noTF32"]
    for name, batch in (("min", 1), ("opt", spec.opt_batch), ("max", spec.max_batch)):
        shapes = ",".join(f"{tensor}:{'x'.join(map(str, (batch, *rest)))}" for tensor, rest in source.inputs.items())
        words.append(f"--{name}Shapes={shapes}")
    words.append(f"--builderOptimizationLevel={spec.optimization_level}")
    if library.cross_builds:
        words.append(f"--computeCapabilities={','.join(name.removeprefix('sm') for name in spec.targets)}")
    else:
        words.append("--stronglyTyped")
    if spec.workspace_gib is not None:
        words.append(f"--memPoolSize=workspace:{spec.workspace_gib * 1024:g}M")
    words += ["--stripWeights"] if spec.stripped else []
    words += ["--versionCompatible"] if spec.version_compatible else []
    levels = {"ampere_plus": "ampere+", "same_compute_capability": "sameComputeCapability"}
    words += [f"--hardwareCompatibilityLevel={levels[spec.hardware]}"] if spec.hardware != "none" else []
    return " ".join(words)


def _network_flags(trt: ModuleType) -> int:
    """Return the flag for strong typing; later libraries are always strongly typed and may not define it."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _fix_batch(network: Any) -> None:
    """Set the batch size to 1, so that the plan has no symbolic shapes."""
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        tensor.shape = (1, *tuple(tensor.shape)[1:])


def _config(trt: ModuleType, builder: Any, spec: EngineSpec, source: EngineGraph) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.builder_optimization_level = spec.optimization_level
    config.clear_flag(trt.BuilderFlag.TF32)  # else float32 products have 10 bits of mantissa on GPUs that support TF32
    if spec.workspace_gib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(spec.workspace_gib * 2**30))
    for is_enabled, flags in (
        (True, LIBRARIES[spec.library].flags),
        (spec.stripped, ("STRIP_PLAN", "REFIT")),
        (spec.version_compatible, ("VERSION_COMPATIBLE",)),
    ):
        for flag in flags if is_enabled else ():
            config.set_flag(getattr(trt.BuilderFlag, flag))
    if spec.hardware != "none":
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, spec.hardware.upper())
    if LIBRARIES[spec.library].cross_builds:
        config.num_compute_capabilities = len(spec.targets)
        for index, target in enumerate(spec.targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index)
    profile = builder.create_optimization_profile()
    for name, rest in source.inputs.items():
        profile.set_shape(name, *((batch, *rest) for batch in (1, spec.opt_batch, spec.max_batch)))
    config.add_optimization_profile(profile)
    return config


def _register(trt: ModuleType) -> Mapping[str, str]:
    from medseg_trt.kernels.plugin import register

    return register(trt)


def _logger(trt: ModuleType) -> Any:
    """Return a logger that stores errors and the list of layers only.

    Other lines contain times. Storing them would change the addresses of later objects, and with them the plan.
    """

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[tuple[Any, str]] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR or message.startswith(LAYERS):
                self.messages.append((severity, message))

    return Logger()


def _monitor(trt: ModuleType, on_progress: OnProgress) -> Any:
    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, num_steps: int) -> None:
            self.steps[phase] = num_steps
            on_progress(phase, 0, num_steps)

        def step_complete(self, phase: str, step: int) -> bool:
            on_progress(phase, step + 1, self.steps.get(phase, 0))
            return True

        def phase_finish(self, phase: str) -> None:
            on_progress(phase, self.steps.get(phase, 0), self.steps.get(phase, 0))

    return Monitor()


def _layers(messages: list[tuple[Any, str]]) -> str:
    return next((text for _, text in reversed(messages) if text.startswith(LAYERS)), "")


def _failure(spec: EngineSpec, trt: ModuleType, graph: Path, messages: list[tuple[Any, str]]) -> str:
    errors = [_oneline(text) for severity, text in messages if severity <= trt.ILogger.Severity.ERROR]
    message = " ".join(errors)
    reason = next((meaning for words, meaning in EXPLAINED.items() if words in message), errors[-1] if errors else "")
    LOG.debug("%s", message)
    return f"{LIBRARY_NAMES[spec.library]} {trt.__version__} builds no engine of {graph.name}: {reason[:600]}"


def _oneline(text: str) -> str:
    return " ".join(text.split())
