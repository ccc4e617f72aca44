"""What a bundle holds as tables for the terminal."""

from medseg_trt.bundles.bundle import Bundle
from medseg_trt.bundles.manifest import BuiltEngine, Execution

FLOAT_PRECISIONS = ("fp32", "fp16", "bf16")


def execution_table(bundle: Bundle) -> tuple[list[str], list[list[str]]]:
    """Return what can be run, as a header and rows of text."""
    header = ["precision", "block", "back-end", "compute", "ms", "agreement", "Dice", "Dice drop <", "MB"]
    return header, [_row(bundle, execution) for execution in bundle.content.executions]


def choice(bundle: Bundle) -> str:
    """Say why the first row of the table is what ``infer`` uses, in one line."""
    first = bundle.default
    if first.median_ms is None:
        return "nothing was timed at the build, so the first row is not known to be the fastest"
    text = f"the first row passed its check and took {first.median_ms:.2f} ms an image at the build"
    if first.streams > 1:
        text += f"; many images run {first.streams} beside each other"
    lower = [item for item in bundle.content.executions if bundle.variant(item).precision not in FLOAT_PRECISIONS]
    timed = [item.median_ms for item in lower if item.median_ms is not None]
    if first in lower or not timed:
        return text
    return f"{text}; lower precisions took {min(timed):.2f} ms or more, not clearly less, so they are not used"


def engine_table(bundle: Bundle) -> tuple[list[str], list[list[str]]]:
    """Return the engines, as a header and rows of text."""
    header = ["engine", "block", "library", "GPUs", "executed", "MB", "build s", "build MB", "failed expectations"]
    return header, [_engine_row(bundle, engine) for engine in bundle.content.engines]


def _row(bundle: Bundle, execution: Execution) -> list[str]:
    variant, verification = bundle.variant(execution), execution.verification
    gate = verification.gate
    size = sum(bundle.content.files[name].bytes for name in _files(bundle, execution))
    return [
        variant.precision + (f" ({variant.dialect})" if variant.dialect != "canonical" else ""),
        bundle.block or "–",
        execution.backend if execution.executed else f"{execution.backend} (not installed here)",
        execution.compute_dtype,
        "–" if execution.median_ms is None else f"{execution.median_ms:.2f}",
        f"{100 * verification.agreement:.2f} %",
        f"{gate.candidate:.4f}" if gate else "same",
        f"{gate.high:.4f}" if gate else "–",
        f"{size / 1e6:.1f}",
    ]


def _files(bundle: Bundle, execution: Execution) -> tuple[str, ...]:
    """Return the files that an execution runs: the plan of an engine, else the graph with its weights."""
    variant = bundle.variant(execution)
    plans = {(engine.variant, engine.spec.library): (engine.plan,) for engine in bundle.content.engines}
    return plans.get((execution.variant, execution.backend), (variant.graph, variant.weights))


def _engine_row(bundle: Bundle, engine: BuiltEngine) -> list[str]:
    precision = bundle.content.variants[engine.variant].precision
    return [
        precision + (" (plugins)" if engine.spec.plugins else ""),
        bundle.block or "–",
        engine.spec.library,
        ", ".join(engine.spec.targets),
        "yes" if engine.executed else "no",
        f"{bundle.content.files[engine.plan].bytes / 1e6:.1f}",
        f"{engine.wall_s:.1f}",
        f"{engine.peak_resident_mb:.0f}",
        str(len(engine.failed_expectations)),
    ]
