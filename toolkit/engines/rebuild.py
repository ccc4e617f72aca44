"""Rebuild the engines of a bundle that do not fit this machine, from the bundle's own graphs."""

from dataclasses import replace

from medseg_trt.bundles.bundle import MANIFEST, Bundle
from medseg_trt.bundles.manifest import BuiltEngine, FileEntry, Manifest
from medseg_trt.bundles.signature import signature_of
from medseg_trt.engines.build import FIRST_PLUGIN_SM, build_engine, engine_files, older_than
from medseg_trt.engines.choice import fingerprint_of, installed_version, runtime_environment
from medseg_trt.engines.fingerprint import mismatches
from medseg_trt.errors import UsageError
from medseg_trt.export.tensorrt.build import LIBRARIES, check_engine_spec, dialect_for, require_library
from medseg_trt.files import sha256, write_json
from medseg_trt.gpu import Gpu, find_gpu
from medseg_trt.progress import LOG
from medseg_trt.spec import LIBRARY_NAMES, EngineSpec, to_dict

DEFAULT_SPEC = EngineSpec(library="tensorrt-rtx", targets=("sm89",))


def rebuild_engines(bundle: Bundle, gpu_number: int = 0) -> Bundle:
    """Rebuild the engines of a bundle that cannot run on a GPU of this machine, from the bundle's own graphs.

    An engine gets the other library where its own does not build for this GPU: TensorRT-RTX does not for Hopper.

    New plans get new names and the manifest is replaced last, so that an interrupt leaves the bundle intact. In the
    bundle that is returned only the new engines are new: everything else is what the loaded manifest says, and with it
    what its signature covers.

    Raises:
        UsageError: the bundle has no engines.
        MissingExtraError: no library that builds for this GPU is installed.
    """
    content = bundle.content
    if not content.engines:
        raise UsageError(
            f"{bundle.folder} has no engines to rebuild; build some: medseg-trt build --ckpt run/best.pt --target sm86"
        )
    gpu = find_gpu(gpu_number)
    engines: list[BuiltEngine] = []
    for engine in content.engines:
        old = fingerprint_of(bundle, engine)
        reasons = mismatches(old, runtime_environment(bundle, old, installed_version(old.library), gpu))
        if not reasons:
            fits = (
                "can run on this machine"
                if gpu is not None
                else "fits this library; there is no GPU to compare it with"
            )
            LOG.info("%s %s; it is kept", engine.plan, fits)
            engines.append(engine)
            continue
        LOG.info("%s Rebuilding it", " ".join(reasons))
        spec = adapted_spec(engine.spec, gpu)
        name = _variant_for(content, engine.variant, spec.library)
        variant = content.variants[name]
        with bundle.private_copy([variant.graph, variant.weights]) as source:
            engines.append(build_engine(bundle.folder, name, variant, spec, source, gpu_number))
    return bundle if engines == list(content.engines) else _replace_engines(bundle, engines)


def adapted_spec(spec: EngineSpec, gpu: Gpu | None) -> EngineSpec:
    """Return how an engine is built for a GPU: with its own library if that can, else with the other one.

    Raises:
        UsageError: no installed library builds it for this GPU; the message has the reason of each.
        MissingExtraError: there is no GPU, and its own library is not installed.
    """
    if gpu is None:
        check_engine_spec(spec, require_library(spec.library), None)
        return spec
    if spec.plugins and older_than(FIRST_PLUGIN_SM, [gpu.sm]):
        LOG.warning(
            "%s runs no plugins, so the engine is built without: their kernels need sm%d", gpu.sm, FIRST_PLUGIN_SM
        )
        spec = replace(spec, plugins=False)
    reasons: list[str] = []
    for library in (spec.library, *(name for name in LIBRARIES if name != spec.library)):
        if installed_version(library) is None:
            reasons.append(f"{LIBRARY_NAMES[library]} is not installed: pip install 'medseg-trt[{library}]'")
            continue
        unsupported = dict.fromkeys(LIBRARIES[library].refuses) if library != spec.library else {}
        defaults = {name: getattr(DEFAULT_SPEC, name) for name in unsupported}
        adapted = replace(spec, library=library, targets=(gpu.sm,), **defaults)
        try:
            check_engine_spec(adapted, require_library(library), gpu.sm)
        except UsageError as error:
            reasons.append(str(error))
            continue
        if library != spec.library:
            LOG.info("the engine is built with %s now: %s", LIBRARY_NAMES[library], "; ".join(reasons))
        return adapted
    raise UsageError(f"no engine can be built for {gpu.name}, {gpu.sm}: {'; '.join(reasons)}")


def _variant_for(content: Manifest, name: str, library: str) -> str:
    """Return the variant of the same precision in the dialect that a library reads.

    Raises:
        UsageError: the bundle has none.
    """
    dialect = dialect_for(library, require_library(library).__version__)
    precision = content.variants[name].precision
    for other, variant in content.variants.items():
        if (variant.precision, variant.dialect) == (precision, dialect):
            return other
    raise UsageError(f"the bundle has no {precision} graph that {LIBRARY_NAMES[library]} reads; build it again here")


def _replace_engines(bundle: Bundle, engines: list[BuiltEngine]) -> Bundle:
    """Write a manifest with other engines, and remove the files of the old ones last; return the new bundle."""
    folder, content = bundle.folder, bundle.content
    new = {path for engine in engines for path in engine_files(folder, engine)}
    old = {path for engine in content.engines for path in engine_files(folder, engine)}
    files = {name: entry for name, entry in content.files.items() if folder / name not in old}
    for path in sorted(new):
        files[path.relative_to(folder).as_posix()] = FileEntry(sha256=sha256(path), bytes=path.stat().st_size)
    executed = {(engine.variant, engine.spec.library) for engine in engines if engine.executed}
    executions = tuple(  # those of an old engine say nothing of the new one
        execution
        for execution in content.executions
        if execution.backend not in LIBRARY_NAMES or (execution.variant, execution.backend) in executed
    )
    manifest: Manifest = replace(content, executions=executions, engines=tuple(engines), files=files)
    write_json(folder / MANIFEST, to_dict(manifest))
    if (signature := signature_of(folder / MANIFEST)).is_file():
        LOG.warning("%s has changed since it was signed; its signature is removed, so sign it again", folder)
        signature.unlink()
    for path in old - new:
        path.unlink(missing_ok=True)
    return replace(bundle, content=manifest, manifest_sha256=sha256(folder / MANIFEST))
