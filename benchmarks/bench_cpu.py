"""Time the full-size LLM-TransUNet on a CPU, batch 1, 256 x 256: PyTorch and other tools against medseg-trt.

Every variant runs in its own process, on all cores. All variants first compute the logits of the same real images, and
a wrong one ends the benchmark. Then they are timed in interleaved rounds, so that drift affects all of them. The
weights are random: this measures speed, memory and rounding, not masks.

    python benchmarks/bench_cpu.py [--json] [--rounds 5] [--fresh]
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_cpu_artefacts import Artefacts, Plan, PlannedBundle, artefacts, in_own_process
from bench_cpu_child import Child, Variant
from bench_cpu_figures import compare_speeds, ratios_of_rounds, sqnr_db
from bench_cpu_graph import folding_error, graph_figures, profile
from bench_cpu_network import IMAGE_SIZE
from bench_cpu_peers import GEMM_MACS, GEMM_TOKENS, GEMM_WIDTH
from results_file import options, publish, table

from medseg_trt.bundles.bundle import load_bundle

SECONDS, MIN_RUNS = 1.5, 3  # of a variant in a round
MIN_SQNR_TO_TIME_DB = 3.0  # less is another network, not a rounded one
IN_ROUNDS = ("fp32", "bf16", "int8")  # precisions whose speed is judged; of the others the memory is
STORED = ("fp32", "int8", "w8a16", "w4a16", "fp16")
PLAN = Plan(
    folder=("bench_cpu",),
    architectures=("llm-transunet", "transunet"),
    image_size=IMAGE_SIZE,
    bundles={
        "exported": PlannedBundle(architecture="llm-transunet", precisions="fp32"),
        "default": PlannedBundle(architecture="llm-transunet", precisions="fp32,bf16,int8"),
        "stored": PlannedBundle(architecture="llm-transunet", precisions="w8a16,w4a16,fp16"),
        "plain": PlannedBundle(architecture="transunet", precisions="int8"),
    },
    has_limit=True,
)
HEAD = ("rows", "machine", "measured", "versions")  # of the result; the rest is printed as it is
HEADER = ("network", "group", "median ms", "p90 ms", "SQNR dB", "max abs error", "anonymous MB", "peak RSS MB")


def peers(made: Artefacts) -> list[Variant]:
    """Return the networks of others, all unfolded."""
    checkpoint, plain = made.checkpoint("llm-transunet"), made.checkpoint("transunet")
    graph, int8 = made.networks / "peers" / "unfolded.onnx", made.networks / "peers" / "int8.xml"
    rows = [
        ("pytorch-eager-fp32", "pytorch", checkpoint, "fp32", "llm-transunet"),
        ("pytorch-bf16", "pytorch", checkpoint, "bf16", "llm-transunet"),
        ("torch-compile-fp32", "torch-compile", checkpoint, "fp32", "llm-transunet"),
        ("pytorch-eager-fp32-transunet", "pytorch", plain, "fp32", "transunet"),
        ("onnxruntime-fp32", "onnxruntime", graph, "fp32", "llm-transunet"),
        ("openvino-fp32", "openvino", graph, "fp32", "llm-transunet"),
        ("openvino-bf16", "openvino", graph, "bf16", "llm-transunet"),
        ("openvino-nncf-int8-fp32", "openvino", int8, "fp32", "llm-transunet"),
        ("openvino-nncf-int8-bf16", "openvino", int8, "bf16", "llm-transunet"),
    ]
    return [
        Variant(name=name, group="peer", opener=opener, path=path, compute=compute, reference=reference)
        for name, opener, path, compute, reference in rows
    ]


def ours(made: Artefacts, name: str, architecture: str = "llm-transunet") -> list[Variant]:
    """Return every execution of a bundle."""
    bundle = load_bundle(made.bundle(name))
    variants = []
    for execution in bundle.content.executions:
        graph = bundle.variant(execution)
        label = f"medseg-trt-{execution.backend}-{execution.variant}"
        variants.append(
            Variant(
                name=label if execution.compute_dtype == "fp32" else f"{label}-{execution.compute_dtype}",
                group="ours",
                opener=execution.backend,
                path=bundle.folder / graph.graph,
                compute=execution.compute_dtype,
                precision=graph.precision,
                reference=architecture,
            )
        )
    return variants


def ours_of_plain(artefacts: Artefacts) -> Variant:
    """Return our fastest INT8 of the TransUNet without a language block."""
    bundle = load_bundle(artefacts.bundle("plain"))
    fastest = bundle.default
    graph = bundle.variant(fastest)
    return Variant(
        name=f"medseg-trt-{fastest.backend}-{fastest.variant}-{fastest.compute_dtype}-transunet",
        group="ours",
        opener=fastest.backend,
        path=bundle.folder / graph.graph,
        compute=fastest.compute_dtype,
        precision=graph.precision,
        reference="transunet",
    )


def verified(child: Child, images: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return how far a variant's logits of the judged images are off.

    Raises:
        SystemExit: they are those of another network.
    """
    reference = images[child.variant.reference]
    logits = child.run(images["judged"])
    ratio = sqnr_db(logits, reference)
    if not ratio >= MIN_SQNR_TO_TIME_DB:
        raise SystemExit(f"{child.variant.name}: SQNR {ratio:.1f} dB; it is not timed, and neither is anything else")
    return {"max_abs_error": float(np.abs(logits - reference).max()), "sqnr_db": ratio}


def measure(variants: Sequence[Variant], images: Mapping[str, np.ndarray], rounds: int) -> dict[str, Any]:
    """Open all variants, verify them, and time them in turn.

    Returns:
        ``errors`` and ``memory`` by variant, and ``rounds``: milliseconds by variant, round and run.
    """
    children: dict[str, Child] = {}
    try:
        errors, samples = dict[str, dict[str, float]](), {variant.name: list[list[float]]() for variant in variants}
        for variant in variants:
            children[variant.name] = child = Child(variant)
            if variant.group != "limit":
                errors[variant.name] = verified(child, images)
            print(f"{variant.name}: opened in {child.opened_s:.1f} s", file=sys.stderr, flush=True)
        gemm_input = np.random.default_rng(0).random((1, GEMM_TOKENS, GEMM_WIDTH), np.float32)
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
            for variant in variants:
                image = gemm_input if variant.group == "limit" else images["judged"][:1]
                samples[variant.name].append(children[variant.name].time(image, SECONDS, MIN_RUNS))
        memory = {name: child.memory() for name, child in children.items()}
        return {"errors": errors, "memory": memory, "rounds": samples}
    finally:
        for child in children.values():
            child.close()


def memory_of_infer(made: Artefacts, images: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Open the bundles as ``infer`` does, and return what it takes after the first image."""
    rows = []
    for precision in STORED:
        bundle = made.bundle("default" if precision in IN_ROUNDS else "stored")
        child = Child(
            Variant(name=f"infer {precision}", group="ours", opener="infer", path=bundle, precision=precision)
        )
        error = verified(child, images)
        weights = (bundle / f"weights-{precision}.bin").stat().st_size / 1e6
        memory = child.memory()
        child.close()
        rows.append({"precision": precision, "weights_mb": weights, **memory, **error})
    return rows


def proven_on(made: Artefacts, best: Variant) -> list[str]:
    """Return the trained networks whose masks passed the gate of ``precisions.py`` in the very way ``best`` rounds."""
    results = Path(__file__).parent / "results" / "precisions.json"
    if not results.is_file():
        return []
    bundle = load_bundle(made.bundle("default"))
    (graph,) = (
        execution for execution in bundle.content.variants.values() if bundle.folder / execution.graph == best.path
    )
    configuration = (best.opener, best.compute, graph.passes["policy"])
    return [
        name
        for name, proof in json.loads(results.read_text())["networks"].items()
        if configuration
        in {
            (execution["backend"], execution["compute_dtype"], proof["policies"][execution["variant"]])
            for execution in proof["executions"]
            if execution["executed"]
        }
    ]


def row(variant: Variant, measured: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line of the table as plain data."""
    samples = np.concatenate(measured["rounds"][variant.name])
    memory = measured["memory"][variant.name]
    return {
        "name": variant.name,
        "group": variant.group,
        "median_ms": float(np.median(samples)),
        "p90_ms": float(np.percentile(samples, 90)),
        "runs": len(samples),
        "peak_rss_mb": memory["peak_resident_mb"],
        "anonymous_mb": memory["anonymous_mb"],
        **measured["errors"].get(variant.name, {}),
        "round_medians_ms": [float(np.median(round_samples)) for round_samples in measured["rounds"][variant.name]],
    }


def to_markdown(result: Mapping[str, Any]) -> str:
    """Return the results as a page."""
    lines = ["# Full-size LLM-TransUNet on a CPU, batch 1, 256 x 256", ""]
    cells = [
        (
            row["name"],
            row["group"],
            f"{row['median_ms']:.1f}",
            f"{row['p90_ms']:.1f}",
            f"{row['sqnr_db']:.1f}" if "sqnr_db" in row else "–",
            f"{row['max_abs_error']:.1e}" if "max_abs_error" in row else "–",
            f"{row['anonymous_mb']:.0f}",
            f"{row['peak_rss_mb']:.0f}",
        )
        for row in result["rows"]
    ]
    lines += [*table(HEADER, cells), "", "```json"]
    lines += [json.dumps({key: value for key, value in result.items() if key not in HEAD}, indent=1)]
    return "\n".join([*lines, "```", ""])


def main() -> None:
    """Measure and write the results."""
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--fresh", action="store_true", help="build the bundles anew and time that, too")
    chosen = parser.parse_args()
    made = artefacts(PLAN, fresh_bundles=chosen.fresh)
    images = made.images()
    limit = Variant(name="int8-gemm", group="limit", opener="openvino", path=made.networks / "gemm.onnx")
    plain = ours_of_plain(made)
    variants = [*peers(made), *ours(made, "default"), plain, limit]
    measured = measure(variants, images, chosen.rounds)
    rows = [row(variant, measured) for variant in variants]
    speeds = compare_speeds(
        measured["rounds"],
        {variant.name: variant.group for variant in variants},
        {name: error["sqnr_db"] for name, error in measured["errors"].items()},
    )
    best = next(variant for variant in variants if variant.name == speeds["ours"])
    graph = made.bundle("default") / "fp32.onnx"
    figures = in_own_process(graph_figures, graph, made.bundle("stored") / "w4a16.onnx")
    rate = (
        GEMM_MACS / next(variant["median_ms"] for variant in rows if variant["group"] == "limit") / 1e6
    )  # 10^9 a second
    best_ms = next(variant["median_ms"] for variant in rows if variant["name"] == best.name)
    int8_files = [*made.bundle("default").glob("int8*.onnx"), made.bundle("default") / "weights-int8.bin"]
    result = {
        "rows": rows,
        "verdict": speeds,
        "ours_over_plain": _ratio(measured["rounds"], best.name, plain.name),
        "masks_proven_on": proven_on(made, best),
        "limit": {
            "int8_gmac_per_s": rate,
            "gmac": figures["gmac"],
            "limit_ms": 1000 * figures["gmac"] / rate,
            "share_reached": 1000 * figures["gmac"] / rate / best_ms,
        },
        "profile": in_own_process(profile, best.path, graph, best.compute, images["judged"][:1]),
        "graph": figures,
        "folded_max_abs_error": in_own_process(folding_error, made),
        "int8_all_flavours_mb": sum(file.stat().st_size for file in int8_files) / 1e6,
        "infer": memory_of_infer(made, images),
        "builds": [made.build_figures(name) for name in PLAN.bundles],
    }
    publish("bench_cpu", result, to_markdown, chosen)


def _ratio(rounds: Mapping[str, Sequence[Sequence[float]]], above: str, below: str) -> dict[str, Any]:
    ratio, bound, ratios = ratios_of_rounds(rounds, above, below)
    return {"above": above, "below": below, "ratio": ratio, "lower_bound": bound, "rounds": ratios}


if __name__ == "__main__":
    main()
