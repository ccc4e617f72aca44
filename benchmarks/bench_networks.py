"""Is INT8 of medseg-trt as fast as the fastest other tool, on every network of the paper? Full size, batch 1, a CPU.

Random weights (``bench_cpu_weights``), one class, all cores. Checkpoints, graphs and bundles are made first and kept in
the cache (``--prepare`` ends there); then the networks are measured one after the other. Every row has a process of its
own, which first computes the logits of real slices: one that is far from PyTorch's ends the benchmark. The rows of a
network are timed in interleaved rounds, so that drift affects all of them. Only the rounds need an idle machine.

    python benchmarks/bench_networks.py [--json] [--rounds 5] [--networks unet,swin-unet] [--prepare]
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bench_cpu import measure, ours, row
from bench_cpu_artefacts import Artefacts, Plan, PlannedBundle, artefacts
from bench_cpu_child import Variant
from bench_cpu_figures import ratios_of_rounds
from results_file import options, publish, table

from medseg_trt.bundles.bundle import load_bundle

SIDES: Mapping[str, int] = {  # of the image in pixels: the paper's, but for Swin-UNet, whose authors have 224
    "unet": 256,
    "swin-unet": 224,
    "ds-transunet-b": 256,
    "transunet": 256,
    "llm-transunet": 256,
}
PYTORCH = "pytorch-eager-fp32"
CPU_FLAGS = Path("/proc/cpuinfo")
BYTE_PRODUCTS = ("avx512_vnni", "avx_vnni", "amx_int8")  # flags of processors that sum products of bytes in 32 bits


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """How our INT8 compares with the fastest of the other tools on one network."""

    network: str
    image_side: int  # pixels
    ours: str  # the row: the fastest INT8 of ours that is as exact as NNCF's, or the fastest of all
    peer: str  # the row: the fastest other tool
    ratio: float  # of the peer's time to ours, the median of the rounds
    lower_bound: float  # of the ratio, 90 % interval
    pytorch_ratio: float  # of PyTorch's time to ours
    sqnr_db: float  # of our logits
    peer_sqnr_db: float

    @property
    def sentence(self) -> str:
        """Say it in words."""
        if self.lower_bound >= 1:
            return f"{self.network}: {self.ours} is {self.ratio:.2f} times as fast as {self.peer}, the fastest peer."
        if self.ratio >= 1:
            return f"{self.network}: {self.ours} cannot be told from {self.peer}, the fastest peer."
        return f"{self.network}: {self.ours} is slower than {self.peer}, {self.ratio:.2f} times its speed."


def plan(network: str) -> Plan:
    """Return what the measurement of a network needs."""
    return Plan(
        folder=("bench_networks", network),
        architectures=(network,),
        image_size=(SIDES[network], SIDES[network]),
        bundles={"default": PlannedBundle(architecture=network, precisions="fp32,int8")},
    )


def rows_of(made: Artefacts, network: str) -> list[Variant]:
    """Return the other tools, on the network as published, and every execution of our bundle.

    NNCF's INT8 is timed with its float parts in bfloat16, too, where our bundle runs so: it is a matter of the CPU.
    """
    graph, int8 = made.networks / "peers" / "unfolded.onnx", made.networks / "peers" / "int8.xml"
    executions = load_bundle(made.bundle("default")).content.executions
    types = sorted({execution.compute_dtype for execution in executions}, reverse=True)
    rows = [
        (PYTORCH, "pytorch", made.checkpoint(network), "fp32"),
        ("openvino-fp32", "openvino", graph, "fp32"),
        *((f"openvino-nncf-int8-{compute}", "openvino", int8, compute) for compute in types),
    ]
    peers = [
        Variant(name=name, group="peer", opener=opener, path=path, compute=compute, reference=network)
        for name, opener, path, compute in rows
    ]
    return [*peers, *ours(made, "default", network)]


def answer(network: str, variants: Sequence[Variant], measured: Mapping[str, Any]) -> Answer:
    """Compare our fastest INT8 with the fastest other tool; one of ours that is less exact than NNCF's comes last."""
    rounds = measured["rounds"]
    medians = {name: float(np.median(np.concatenate(samples))) for name, samples in rounds.items()}
    sqnr = {name: error["sqnr_db"] for name, error in measured["errors"].items()}
    peers = [variant.name for variant in variants if variant.group == "peer"]
    integers = [variant.name for variant in variants if variant.group == "ours" and variant.precision == "int8"]
    floor = min(sqnr[name] for name in peers if "int8" in name)
    exact = [name for name in integers if sqnr[name] >= floor]
    best, peer = (min(names, key=medians.__getitem__) for names in (exact or integers, peers))
    ratio, bound, _ = ratios_of_rounds(rounds, peer, best)
    return Answer(
        network=network,
        image_side=SIDES[network],
        ours=best,
        peer=peer,
        ratio=ratio,
        lower_bound=bound,
        pytorch_ratio=ratios_of_rounds(rounds, PYTORCH, best)[0],
        sqnr_db=sqnr[best],
        peer_sqnr_db=sqnr[peer],
    )


def has_byte_products() -> bool:
    """Say whether the processor sums products of bytes without saturating at 16 bits."""
    return CPU_FLAGS.is_file() and any(flag in CPU_FLAGS.read_text(encoding="utf-8") for flag in BYTE_PRODUCTS)


def to_markdown(result: Mapping[str, Any]) -> str:
    """Return the results as a page."""
    answers = [Answer(**fields) for fields in result["answers"]]
    processor = (
        "The processor has VNNI or AMX."
        if result["byte_products"]
        else "**The processor has AVX2 and neither VNNI nor AMX: sums of 8-bit products saturate at 16 bits, so that "
        "INT8 is slower and far less exact than on one that has them, for all tools alike.**"
    )
    summary = [
        (
            f"{given.network}, {given.image_side} x {given.image_side}",
            given.ours,
            f"{given.pytorch_ratio:.2f}x",
            given.peer,
            f"{given.ratio:.2f}x",
            f"{given.lower_bound:.2f}x",
            _decibels(given.sqnr_db),
            _decibels(given.peer_sqnr_db),
        )
        for given in answers
    ]
    lines = [
        "# The five networks of the paper on a CPU, batch 1",
        "",
        f"Full size, random weights, one class; {result['rounds']} interleaved rounds, one run. {processor}",
        "",
        *(f"- {given.sentence}" for given in answers),
        "",
        *table(
            ("network", "ours", "to PyTorch", "fastest peer", "to it", "low end", "SQNR dB", "peer's SQNR dB"), summary
        ),
    ]
    for given in answers:
        cells = [
            (
                row["name"],
                f"{row['median_ms']:.1f}",
                f"{row['p90_ms']:.1f}",
                str(row["runs"]),
                _decibels(row["sqnr_db"]),
                f"{row['anonymous_mb']:.0f}",
                f"{row['peak_rss_mb']:.0f}",
            )
            for row in result["networks"][given.network]
        ]
        header = ("row", "median ms", "p90 ms", "runs", "SQNR dB", "anonymous MB", "peak RSS MB")
        lines += ["", f"## {given.network}", "", *table(header, cells)]
    return "\n".join([*lines, ""])


def _decibels(value: float) -> str:
    return f"{value:.1f}" if np.isfinite(value) else "–"


def main() -> None:
    """Make everything, measure, and write the results."""
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--networks", default=",".join(SIDES), help="comma-separated")
    parser.add_argument("--prepare", action="store_true", help="make what is not in the cache, and measure nothing")
    chosen = parser.parse_args()
    made = {network: artefacts(plan(network)) for network in chosen.networks.split(",")}
    if chosen.prepare:
        return
    rows, answers = dict[str, Any](), list[Answer]()
    for network, files in made.items():
        variants = rows_of(files, network)
        measured = measure(variants, files.images(), chosen.rounds)
        rows[network] = [row(variant, measured) for variant in variants]
        answers.append(answer(network, variants, measured))
    result = {
        "rounds": chosen.rounds,
        "byte_products": has_byte_products(),
        "answers": [asdict(given) for given in answers],
        "networks": rows,
    }
    publish("networks", result, to_markdown, chosen)


if __name__ == "__main__":
    main()
