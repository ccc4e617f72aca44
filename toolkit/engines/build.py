"""Build the engines of a bundle: one for every precision, from the bundle's own graphs.

A fingerprint and a layer report lie beside every plan. An engine can be built on any machine and is not run here; until
one is run on a GPU that it fits, the mask verification in the bundle comes from running the same graph.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from medseg_trt.bundles.manifest import ENGINES_FOLDER, BuiltEngine, Variant
from medseg_trt.engines.child import EngineBuild, build_in_child
from medseg_trt.engines.choice import installed_version
from medseg_trt.engines.fingerprint import EngineFingerprint, metadata_path, write_fingerprint
from medseg_trt.errors import MedsegError, MissingExtraError, UsageError
from medseg_trt.export.engine_layers import LAYERS_SUFFIX
from medseg_trt.export.tensorrt.build import LIBRARIES, check_engine_spec, cuda_of, dialect_for, require_library
from medseg_trt.files import cache_folder, sha256, write_json
from medseg_trt.gpu import Gpu, find_gpu
from medseg_trt.progress import LOG
from medseg_trt.spec import LIBRARY_NAMES, EngineSpec, to_dict

FIRST_FP8_SM = 89
FIRST_PLUGIN_SM = 80  # the oldest that the kernels of plugins are compiled for
MEMINFO = Path("/proc/meminfo")
# Full-size builds in four precisions used BASE_BYTES and 2.9 to 3.0 times the size of the weights.
BASE_BYTES, BYTES_PER_WEIGHT_BYTE = 600 << 20, 3.0
EXECUTION_HINTS: Mapping[str, str] = {"bf16": "bf16 runs the fp32 graph on a CPU; there is no bf16 graph"}
PLAIN_INTEGERS = "its graph for TensorRT before 10.15 has asymmetric activations; build with a later version"


@dataclass(frozen=True, kw_only=True, slots=True)
class Engines:
    """The result of building engines."""

    built: tuple[BuiltEngine, ...]
    rejected: tuple[str, ...]  # the engines that were not built, each with its reason


def older_than(sm: int, targets: Iterable[str]) -> list[str]:
    """Return those of the GPUs, such as "sm75", that are older than a compute capability, 80 for 8.0."""
    return [target for target in targets if int(target.removeprefix("sm")) < sm]


def check_engines(spec: EngineSpec, outputs: str, precisions: Iterable[str], gpu_number: int = 0) -> None:
    """Reject unsupported options before a build that takes minutes.

    Args:
        spec: how to build.
        outputs: what the graphs give.
        precisions: of the graphs.
        gpu_number: CUDA's number of the GPU, for a library that builds on one.

    Raises:
        UsageError: an unknown GPU or library, one without fp8 or too old for plugins, or graphs that also output masks.
        MissingExtraError: the library is not installed.
        DeviceError: the library needs a GPU to build, and this machine has none.
    """
    gpu = find_gpu(gpu_number)
    check_engine_spec(spec, require_library(spec.library), gpu.sm if gpu else None)
    older = older_than(FIRST_FP8_SM, spec.targets)
    if older and "fp8" in ",".join(precisions):
        raise UsageError(f"{', '.join(older)} has no fp8; leave it out, or build without fp8")
    too_old = older_than(FIRST_PLUGIN_SM, spec.targets)
    if too_old and spec.plugins:
        raise UsageError(
            f"{', '.join(too_old)} runs no plugins: their kernels are compiled for compute capability 8.0 and newer, "
            f"sm{FIRST_PLUGIN_SM}; leave --plugins or this GPU out"
        )
    if outputs != "logits":
        raise UsageError(
            "engines are built from graphs that give logits: choose --outputs logits, or leave --target out"
        )


def default_library() -> str:
    """Return the installed library; TensorRT-RTX is preferred, because it builds for GPUs of other machines.

    Raises:
        MissingExtraError: neither is installed.
    """
    for name in LIBRARIES:
        if installed_version(name) is not None:
            return name
    extras = " or ".join(f"pip install 'medseg-trt[{library.extra}]'" for library in LIBRARIES.values())
    raise MissingExtraError(f"no library that builds engines is installed. Install one: {extras}")


def build_engines(
    folder: Path,
    variants: Mapping[str, Variant],
    verified: Collection[str],
    spec: EngineSpec,
    precisions: Iterable[str],
    gpu_number: int = 0,
) -> Engines:
    """Build an engine of every precision into ``folder/engines``.

    Args:
        folder: of the bundle, with its graphs.
        variants: the graphs by name; only those in the dialect that the library reads are built.
        verified: names of the graphs whose masks were verified.
        spec: accepted by ``check_engines``.
        precisions: the requested precisions, some of which have no graph.
        gpu_number: CUDA's number of the GPU, for a library that builds on one.

    Raises:
        MedsegError: all engines failed; if only some failed, they are rejected with their reasons.
    """
    trt_version = require_library(spec.library).__version__
    dialect = dialect_for(spec.library, trt_version)
    rejected = [f"{name} engine: {EXECUTION_HINTS[name]}" for name in precisions if name in EXECUTION_HINTS]
    built: list[BuiltEngine] = []
    errors: list[MedsegError] = []
    for name, variant in variants.items():
        if variant.dialect != dialect:
            continue
        if name not in verified:
            rejected.append(f"{variant.precision} engine: no back-end has verified its graph {variant.graph}")
            continue
        if dialect == "plain" and "int8" in variant.precision:
            rejected.append(f"{variant.precision} engine: {PLAIN_INTEGERS}")
            continue
        try:
            built.append(build_engine(folder, name, variant, spec, folder, gpu_number))
        except MedsegError as error:
            rejected.append(f"{variant.precision} engine: {error}")
            LOG.warning("%s", error)
            errors.append(error)
    if errors and not built:
        raise errors[0]
    return Engines(built=tuple(built), rejected=tuple(rejected))


def build_engine(
    folder: Path, name: str, variant: Variant, spec: EngineSpec, source: Path, gpu_number: int
) -> BuiltEngine:
    """Build one engine from the graph in ``source``, and write it with its layer report and fingerprint."""
    graph, weights = source / variant.graph, source / variant.weights
    (folder / ENGINES_FOLDER).mkdir(exist_ok=True)
    plan = _free_path(folder / ENGINES_FOLDER, f"{name}-{'-'.join(spec.targets)}{'-plugins' if spec.plugins else ''}")
    _warn_of_memory(weights, plan.name)
    LOG.info(
        "building an engine of %s for %s with %s", variant.graph, ", ".join(spec.targets), LIBRARY_NAMES[spec.library]
    )
    gpu = None if LIBRARIES[spec.library].cross_builds else find_gpu(gpu_number)
    build = build_in_child(graph, plan, spec, _cache_file(spec, gpu), gpu_number)
    LOG.info("the equivalent shell command: %s", build.output.command)
    for repair in build.output.repairs:
        LOG.info("changed in a copy of the graph: %s", repair)
    failed_expectations = _write_layer_report(graph, plan, spec, build)
    write_fingerprint(_fingerprint(variant, spec, gpu, build, plan, (graph, weights)), plan.parent)
    return BuiltEngine(
        plan=f"{ENGINES_FOLDER}/{plan.name}",
        variant=name,
        spec=spec,
        wall_s=build.wall_s,
        processor_s=build.processor_s,
        peak_resident_mb=build.peak_resident_mb,
        failed_expectations=failed_expectations,
    )


def _free_path(folder: Path, stem: str) -> Path:
    """Return an unused path for a plan: files of the old manifest stay until the new manifest is written."""
    names = (f"{stem}.plan", *(f"{stem}-{number}.plan" for number in range(2, 1000)))
    return next(folder / name for name in names if not (folder / name).exists())


def _write_layer_report(graph: Path, plan: Path, spec: EngineSpec, build: EngineBuild) -> tuple[str, ...]:
    """Write the layer report and return the failed expectations."""
    import onnx
    import onnx_ir as ir

    from medseg_trt.export.graph.onnx_graph import OnnxGraph
    from medseg_trt.export.tensorrt.expectations import layer_report
    from medseg_trt.export.tensorrt.graph import engine_graph

    model = onnx.load_from_string(engine_graph(graph, plugins=spec.plugins).serialized)
    report = layer_report(build.output.layers, OnnxGraph(model=ir.from_proto(model)))
    write_json(plan.with_suffix(LAYERS_SUFFIX), to_dict(report))
    failed_expectations = tuple(
        f"{outcome.name}: not for {len(outcome.failed)} of {outcome.asked}"
        for outcome in report.outcomes
        if not outcome.holds
    )
    for line in failed_expectations:
        LOG.info("%s: failed expectation: %s", plan.name, line)
    if not report.layers:
        LOG.warning("%s: the builder's list of layers has an unknown format; its layer report is empty", plan.name)
    return failed_expectations


def _fingerprint(
    variant: Variant, spec: EngineSpec, gpu: Gpu | None, build: EngineBuild, plan: Path, sources: tuple[Path, Path]
) -> EngineFingerprint:
    graph, weights = sources
    return EngineFingerprint(
        plan=plan.name,
        sha256=sha256(plan),
        bytes=plan.stat().st_size,
        library=spec.library,
        version=build.output.version,
        targets=spec.targets,
        gpu=gpu.name if gpu else None,
        driver=gpu.driver if gpu else None,
        cuda=cuda_of(spec.library),
        precision=variant.precision,
        dialect=variant.dialect,
        graph=graph.name,
        graph_sha256=sha256(graph),
        weights_sha256=sha256(weights),
        plugins=build.output.plugins,
        batch=(1, spec.opt_batch, spec.max_batch),
        stripped=spec.stripped,
        version_compatible=spec.version_compatible,
        hardware=spec.hardware,
        options={
            "optimization_level": spec.optimization_level,
            "workspace_gib": spec.workspace_gib,
            "plugins": spec.plugins,
            "repairs": list(build.output.repairs),
        },
    )


def engine_files(folder: Path, engine: BuiltEngine) -> tuple[Path, ...]:
    """Return the paths of an engine's files in a bundle: the plan, its fingerprint and its layer report."""
    plan = folder / engine.plan
    return plan, metadata_path(plan), plan.with_suffix(LAYERS_SUFFIX)


def _cache_file(spec: EngineSpec, gpu: Gpu | None) -> Path | None:
    """Return the path of the timing cache for this GPU and library version; None: the library times nothing."""
    if gpu is None:
        return None
    return (
        cache_folder("timings")
        / f"{spec.library}-{installed_version(spec.library)}-{gpu.sm}-{gpu.name.replace(' ', '_')}.cache"
    )


def _warn_of_memory(weights: Path, plan_name: str) -> None:
    needed, free = BASE_BYTES + BYTES_PER_WEIGHT_BYTE * weights.stat().st_size, _available_bytes()
    if free is not None and free < needed:
        LOG.warning(
            "building %s takes about %.1f GB of memory and %.1f GB are free; close something, or build elsewhere",
            plan_name,
            needed / 1e9,
            free / 1e9,
        )


def _available_bytes() -> int | None:
    """Return the bytes that a new process may use without swapping; None: the system does not report them."""
    if not MEMINFO.is_file():
        return None
    lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines() if ":" in line)
    return int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else None
