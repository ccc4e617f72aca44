"""Verify and time the engines of a build on the GPU of this machine, as the graphs that they were built from were.

An engine is opened from a bundle, so the folder is sealed once before: a child process then checks its digest and its
fingerprint as ``infer`` does. An engine with wrong masks is removed from the bundle; one that this machine cannot run
stays in it, unverified.
"""

from dataclasses import dataclass, field, replace

from medseg_trt.building.deployment import Deployment
from medseg_trt.building.executions import ExecutionTrials, execution_child, label_of, settled, try_execution
from medseg_trt.bundles.bundle import Bundle
from medseg_trt.bundles.manifest import BuiltEngine, Execution
from medseg_trt.engines.build import Engines, engine_files
from medseg_trt.engines.choice import fingerprint_of, installed_version, runtime_environment
from medseg_trt.engines.fingerprint import mismatches
from medseg_trt.errors import AccuracyGateError, ArtefactError, DeviceError, MedsegError
from medseg_trt.gpu import Gpu, find_gpu, listed_gpus
from medseg_trt.progress import LOG

ON_CPU = "this build runs on the CPU; engines are verified where a GPU is that they fit: --device cuda"
UNVERIFIED = "%s was not verified: %s"
COMPUTE = "fp32"  # what an engine's execution is listed with: its own types are those of its precision


@dataclass(kw_only=True)
class _Trials:
    """What came of the engines so far, by their plans."""

    verified: dict[str, Execution] = field(default_factory=dict[str, Execution])
    refused: dict[str, MedsegError] = field(default_factory=dict[str, MedsegError])
    rejected: list[str] = field(default_factory=list[str])  # refused, or not to be run here, each with its reason


def try_engines(bundle: Bundle, deployed: Deployment, engines: Engines) -> tuple[ExecutionTrials, Engines]:
    """Run every engine that fits the GPU of the build; compare it with the reference, then time it among the others.

    Args:
        bundle: the one that is being made, sealed with its engines.
        deployed: the graphs and the ways to run them, which are timed once more beside the engines.
        engines: those of the bundle.

    Returns:
        The executions with those of engines among them, and the engines without those that are refused, whose files
        are removed. Every engine that is refused, or that this machine cannot run although it fits, is a line.

    Raises:
        AccuracyGateError, ArtefactError: no engine is left; the reason is that of the first.
    """
    gpu, trials = find_gpu(deployed.reference.device.number), _Trials()
    for engine in engines.built:
        if obstacle := _obstacle(bundle, engine, gpu):
            LOG.info(UNVERIFIED, engine.plan, obstacle)
        else:
            _verify(bundle, engine, deployed, trials)
    tried = _timed_together(bundle, deployed, trials) if trials.verified else deployed.tried
    executed = {(execution.variant, execution.backend) for execution in tried.executions}
    kept = list[BuiltEngine]()
    for engine in engines.built:
        is_executed = (engine.variant, engine.spec.library) in executed
        if is_executed or engine.plan not in (*trials.verified, *trials.refused):
            kept.append(replace(engine, executed=is_executed))
        else:
            for path in engine_files(bundle.folder, engine):
                path.unlink(missing_ok=True)
    if not kept:
        died = ArtefactError(f"every engine died while it was timed: {'; '.join(tried.rejected)}")
        raise next(iter(trials.refused.values()), died)
    return tried, Engines(built=tuple(kept), rejected=(*engines.rejected, *trials.rejected))


def say_unverified(engines: Engines) -> None:
    """Say that no engine was run, because the build tries nothing on a GPU."""
    for engine in engines.built:
        LOG.info(UNVERIFIED, engine.plan, ON_CPU)


def _obstacle(bundle: Bundle, engine: BuiltEngine, gpu: Gpu | None) -> str:
    """Say why an engine does not fit the GPU; empty where it does."""
    if gpu is None:
        return listed_gpus().words
    fingerprint = fingerprint_of(bundle, engine)
    version = installed_version(engine.spec.library)
    return " ".join(mismatches(fingerprint, runtime_environment(bundle, fingerprint, version, gpu)))


def _verify(bundle: Bundle, engine: BuiltEngine, deployed: Deployment, trials: _Trials) -> None:
    """Compare one engine with the reference; its error is noted, and loses nothing else."""
    variant, library = deployed.variants[engine.variant], engine.spec.library
    try:
        execution = try_execution(
            bundle.folder, engine.variant, variant, library, COMPUTE, deployed.reference, deployed.golden
        )
        _judge_second(bundle, execution, deployed)
    except MedsegError as error:
        line = f"{engine.plan}: {error}".replace(f"{bundle.folder}/", "")
        trials.rejected.append(line)
        if not isinstance(error, DeviceError):  # else this machine cannot, which is no fault of the engine
            trials.refused[engine.plan] = error
            LOG.warning("the engine is not used: %s", line)
    else:
        trials.verified[engine.plan] = execution


def _judge_second(bundle: Bundle, execution: Execution, deployed: Deployment) -> None:
    """Judge a rounded engine on the second split, where rounded executions are."""
    variant = deployed.variants[execution.variant]
    if deployed.second is None or variant.precision == "fp32":
        return
    with execution_child(bundle.folder, variant, execution, deployed.reference.device) as session:
        verdict, _ = deployed.second.verdict(session.run)
    if not verdict.holds:
        raise AccuracyGateError(f"{session.description} draws other masks on the second split: {verdict}")


def _timed_together(bundle: Bundle, deployed: Deployment, trials: _Trials) -> ExecutionTrials:
    """Time all executions in turn, so that engines are compared with times of the same minutes."""
    plans = {label_of(execution): plan for plan, execution in trials.verified.items()}
    everything = replace(deployed.tried, executions=(*deployed.tried.executions, *trials.verified.values()))
    return settled(
        bundle.folder,
        deployed.variants,
        everything,
        {},
        deployed.golden[0],
        deployed.reference.device,
        lambda execution: plans.get(label_of(execution), label_of(execution)),
    )
