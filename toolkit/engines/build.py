"""Give a bundle engines: one for every precision, built from its own graphs, with everything that is known of each.

Beside every plan lie its fingerprint and the report of its layers. An engine is built on any machine, but it is not run
here: what the bundle says of its masks was found by running the same graph on the CPU.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from medseg_trt.bundles.bundle import MANIFEST, Bundle, load_bundle
from medseg_trt.bundles.manifest import BuiltEngine, FileEntry, Manifest, Variant
from medseg_trt.bundles.signature import signature_of
from medseg_trt.engines.child import Answer, build_in_child
from medseg_trt.engines.choice import installed_version, runtime_environment
from medseg_trt.engines.fingerprint import (
    FOLDER,
    EngineFingerprint,
    mismatches,
    read_fingerprint,
    side_car,
    write_fingerprint,
)
from medseg_trt.engines.gpu import Gpu, find_gpu
from medseg_trt.errors import MedsegError, MissingExtraError, UsageError
from medseg_trt.export.engine_layers import LAYERS_SUFFIX
from medseg_trt.export.tensorrt.build import LIBRARIES, check_engine_spec, cuda_of, flavour_for, require_library
from medseg_trt.files import cache_folder, inside, sha256, write_json
from medseg_trt.progress import LOG
from medseg_trt.spec import LIBRARY_NAMES, EngineSpec, to_dict

FIRST_FP8_SM = 89
MEMINFO = Path("/proc/meminfo")
# Full-size builds in four precisions took this and 2.9 to 3.0 times the weights.
BASE_BYTES, BYTES_PER_WEIGHT_BYTE = 600 << 20, 3.0
EXECUTION_HINTS: Mapping[str, str] = {"bf16": "bf16 is a way to run the fp32 graph on a CPU; there is no graph in bf16"}
PLAIN_INTEGERS = (
    "its graph for TensorRT before 10.15 has activations that are not symmetric; build with a later version"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Engines:
    """What was built."""

    built: tuple[BuiltEngine, ...]
    dropped: tuple[str, ...]  # what was not, each with its reason


def check_engines(spec: EngineSpec, outputs: str, precisions: Iterable[str]) -> None:
    """Refuse what no engine can be built for, before minutes are spent.

    Raises:
        UsageError: an unknown GPU or library, or graphs that also make masks.
        MissingExtraError: the library is not installed.
        DeviceError: the library needs a GPU to build, and none is here.
    """
    gpu = find_gpu()
    check_engine_spec(spec, require_library(spec.library), gpu.sm if gpu else None)
    older = [target for target in spec.targets if int(target.removeprefix("sm")) < FIRST_FP8_SM]
    if older and "fp8" in ",".join(precisions):
        raise UsageError(f"{', '.join(older)} has no fp8; leave it out, or build without fp8")
    if outputs != "logits":
        raise UsageError(
            "engines are built from graphs that give logits: choose --outputs logits, or leave --target out"
        )


def default_library() -> str:
    """Return the library that is installed; TensorRT-RTX first, since it builds for GPUs that are not here.

    Raises:
        MissingExtraError: neither is.
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
) -> Engines:
    """Build an engine of every precision into ``folder/engines``.

    Args:
        folder: of the bundle, with its graphs.
        variants: the graphs by name; those in the flavour that the library reads are built.
        verified: names of the graphs whose masks were found right.
        spec: passed ``check_engines``.
        precisions: that were asked for, of which some have no graph.

    Raises:
        MedsegError: the builder makes none of the engines; where it makes some, the others are dropped with the reason.
    """
    trt_version = require_library(spec.library).__version__
    flavour = flavour_for(spec.library, trt_version)
    dropped = [f"{name} engine: {EXECUTION_HINTS[name]}" for name in precisions if name in EXECUTION_HINTS]
    built: list[BuiltEngine] = []
    failed: list[MedsegError] = []
    for name, variant in variants.items():
        if variant.flavour != flavour:
            continue
        if name not in verified:
            dropped.append(
                f"{variant.precision} engine: no back-end has run its graph {variant.graph} and found it right"
            )
            continue
        if flavour == "plain" and "int8" in variant.precision:
            dropped.append(f"{variant.precision} engine: {PLAIN_INTEGERS}")
            continue
        try:
            built.append(_build(folder, name, variant, spec))
        except MedsegError as error:
            dropped.append(f"{variant.precision} engine: {error}")
            LOG.warning("%s", error)
            failed.append(error)
    if failed and not built:
        raise failed[0]
    return Engines(built=tuple(built), dropped=tuple(dropped))


def rebuild_engines(bundle: Bundle) -> Bundle:
    """Build those engines of a bundle again that do not fit this machine, from the bundle's own graphs.

    The new plans get names of their own and the manifest names them last, so that an interrupt leaves the bundle whole.

    Raises:
        UsageError: the bundle has no engines.
        MissingExtraError: the library of one is not installed.
    """
    content = bundle.content
    if not content.engines:
        raise UsageError(
            f"{bundle.folder} has no engines to build again; build some: medseg-trt build --ckpt model.pt --target sm86"
        )
    gpu = find_gpu()
    kept: list[BuiltEngine] = []
    for engine in content.engines:
        old = read_fingerprint(inside(bundle.folder, engine.plan))
        reasons = mismatches(old, runtime_environment(bundle, old, installed_version(old.library), gpu))
        if not reasons:
            LOG.info("%s fits; it stays", engine.plan)
            kept.append(engine)
            continue
        LOG.info("%s Build it again", " ".join(reasons))
        spec = replace(engine.spec, targets=(gpu.sm,) if gpu else engine.spec.targets)
        trt = require_library(spec.library)
        check_engine_spec(spec, trt, gpu.sm if gpu else None)
        kept.append(_build(bundle.folder, engine.variant, content.variants[engine.variant], spec))
    if kept != list(content.engines):
        _replace(bundle, kept)
    return load_bundle(bundle.folder)


def _build(folder: Path, name: str, variant: Variant, spec: EngineSpec) -> BuiltEngine:
    """Build one engine and write what is known of it; the plan is there last."""
    graph, weights = folder / variant.graph, folder / variant.weights
    (folder / FOLDER).mkdir(exist_ok=True)
    plan = _free_path(folder / FOLDER, f"{name}-{'-'.join(spec.targets)}{'-plugins' if spec.plugins else ''}")
    _warn_of_memory(weights, plan.name)
    LOG.info(
        "build an engine of %s for %s with %s", variant.graph, ", ".join(spec.targets), LIBRARY_NAMES[spec.library]
    )
    gpu = None if LIBRARIES[spec.library].cross_builds else find_gpu()
    answer = build_in_child(graph, plan, spec, _cache_file(spec, gpu))
    LOG.info("the same from a shell: %s", answer.built.command)
    for repair in answer.built.repairs:
        LOG.info("on a copy of the graph, %s", repair)
    report = _write_report(graph, plan, spec, answer)
    write_fingerprint(_fingerprint(variant, spec, gpu, answer, plan, (graph, weights)), plan.parent)
    return BuiltEngine(
        plan=f"{FOLDER}/{plan.name}", variant=name, spec=spec, wall_s=answer.wall_s,
        processor_s=answer.processor_s,
        peak_resident_mb=answer.peak_resident_mb, unmet=report,
    )  # fmt: skip


def _free_path(folder: Path, stem: str) -> Path:
    """Return a path for a plan that is not there yet: what an older manifest names stays until the new one is there."""
    names = (f"{stem}.plan", *(f"{stem}-{number}.plan" for number in range(2, 1000)))
    return next(folder / name for name in names if not (folder / name).exists())


def _write_report(graph: Path, plan: Path, spec: EngineSpec, answer: Answer) -> tuple[str, ...]:
    """Write the report of the layers and return what was expected in vain."""
    import onnx
    import onnx_ir as ir

    from medseg_trt.export.graph.onnx_graph import OnnxGraph
    from medseg_trt.export.tensorrt.expectations import layer_report
    from medseg_trt.export.tensorrt.graph import engine_graph

    read = onnx.load_from_string(engine_graph(graph, plugins=spec.plugins).serialized)
    report = layer_report(answer.built.layers, OnnxGraph(model=ir.from_proto(read)))
    write_json(plan.with_suffix(LAYERS_SUFFIX), to_dict(report))
    unmet = tuple(
        f"{each.name}: not for {len(each.failed)} of {each.asked}" for each in report.outcomes if not each.holds
    )
    for line in unmet:
        LOG.info("%s: expected, but not found: %s", plan.name, line)
    if not report.layers:
        LOG.warning("%s: the builder's list of layers is in a form that is not known; there is no report", plan.name)
    return unmet


def _fingerprint(
    variant: Variant, spec: EngineSpec, gpu: Gpu | None, answer: Answer, plan: Path, sources: tuple[Path, Path]
) -> EngineFingerprint:
    graph, weights = sources
    return EngineFingerprint(
        plan=plan.name, sha256=sha256(plan), bytes=plan.stat().st_size, library=spec.library,
        version=answer.built.version, targets=spec.targets, gpu=gpu.name if gpu else None,
        driver=gpu.driver if gpu else None, cuda=cuda_of(spec.library), precision=variant.precision,
        flavour=variant.flavour, graph=graph.name, graph_sha256=sha256(graph), weights_sha256=sha256(weights),
        plugins=answer.built.plugins, batch=(1, spec.opt_batch, spec.max_batch), stripped=spec.stripped,
        version_compatible=spec.version_compatible, hardware=spec.hardware,
        options={
            "optimization_level": spec.optimization_level, "workspace_gib": spec.workspace_gib,
            "plugins": spec.plugins, "repairs": list(answer.built.repairs),
        },
    )  # fmt: skip


def _replace(bundle: Bundle, engines: list[BuiltEngine]) -> None:
    """Let the manifest name other engines; files that it does not name any more go last."""
    folder, content = bundle.folder, bundle.content
    new = {path for engine in engines for path in _files_of(folder, engine)}
    old = {path for engine in content.engines for path in _files_of(folder, engine)}
    files = {name: entry for name, entry in content.files.items() if folder / name not in old}
    for path in sorted(new):
        files[path.relative_to(folder).as_posix()] = FileEntry(sha256=sha256(path), bytes=path.stat().st_size)
    manifest: Manifest = replace(content, engines=tuple(engines), files=files)
    write_json(folder / MANIFEST, to_dict(manifest))
    if (signature := signature_of(folder / MANIFEST)).is_file():
        LOG.warning("%s is another bundle now than the one that was signed; its signature is removed", folder)
        signature.unlink()
    for path in old - new:
        path.unlink(missing_ok=True)


def _files_of(folder: Path, engine: BuiltEngine) -> tuple[Path, ...]:
    plan = folder / engine.plan
    return plan, side_car(plan), plan.with_suffix(LAYERS_SUFFIX)


def _cache_file(spec: EngineSpec, gpu: Gpu | None) -> Path | None:
    """Return where the timings of this GPU and this version are kept; a library that times nothing keeps none."""
    if gpu is None:
        return None
    return (
        cache_folder("timings")
        / f"{spec.library}-{installed_version(spec.library)}-{gpu.sm}-{gpu.name.replace(' ', '_')}.cache"
    )


def _warn_of_memory(weights: Path, what: str) -> None:
    needed, free = BASE_BYTES + BYTES_PER_WEIGHT_BYTE * weights.stat().st_size, _available_bytes()
    if free is not None and free < needed:
        LOG.warning(
            "building %s takes about %.1f GB of memory and %.1f GB are free; close something, or build elsewhere",
            what, needed / 1e9, free / 1e9,
        )  # fmt: skip


def _available_bytes() -> int | None:
    """Return how much memory a new process may take without swapping, or None where the system does not say."""
    if not MEMINFO.is_file():
        return None
    lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines() if ":" in line)
    return int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else None
