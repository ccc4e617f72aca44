"""How much memory does a training step of the full-size LLM-TransUNet take, with its frozen block in fp32 and in bf16?

A block of LLaMA-7B's geometry with random weights is written to a file in float16, like an extracted one. Each row is a
process of its own, which builds the network from that file as ``medseg-trt train`` does, and takes two steps with Adam
on random images; the second step has the full state of the optimiser. The peak resident memory is the system's figure.

    python benchmarks/train_step_memory.py
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from results_file import options, publish

from medseg_trt.processes import python_command

MIB = 1 << 20
ROWS: Mapping[str, tuple[str, str, str]] = {  # architecture, frozen_dtype, autocast
    "TransUNet, without a block": ("transunet", "fp32", "no"),
    "LLM-TransUNet, block in fp32": ("llm-transunet", "fp32", "no"),
    "LLM-TransUNet, block in bf16": ("llm-transunet", "bf16", "no"),
    "LLM-TransUNet, block in bf16, steps in bf16": ("llm-transunet", "bf16", "bf16"),
}


def take_steps(name: str, block: Path, image_size: int, batch_size: int) -> dict[str, Any]:
    """Build a network, take two steps, and return what this process needed."""
    import numpy as np
    import torch

    from medseg_trt.spec import Preprocessing
    from medseg_trt.train.block.blocks import load_block
    from medseg_trt.train.datasets.prepared import PreparedSlices
    from medseg_trt.train.loop import make_optimizer, train_epoch
    from medseg_trt.train.models.frozen import keep_frozen_in
    from medseg_trt.train.models.model import build_model, model_spec
    from medseg_trt.train.recipes.recipes import Recipe, TrainSpec

    architecture, frozen_dtype, autocast = ROWS[name]
    imported = peak_bytes()
    size = (image_size, image_size)
    spec = TrainSpec(
        epochs=1,
        batch_size=batch_size,
        optimizer="adam",
        learning_rate=1e-4,
        frozen_dtype=frozen_dtype,
        autocast=autocast,
    )
    recipe = Recipe(architecture=architecture, preprocessing=Preprocessing(image_size=size), train=spec)
    described = model_spec(architecture, size, 9)
    model = build_model(described, load_block(block) if described.block is not None else None)
    keep_frozen_in(model, frozen_dtype)
    built = peak_bytes()
    random = np.random.default_rng(0)
    slices = PreparedSlices(
        images=random.standard_normal((2 * batch_size, 3, *size), np.float32),
        labels=random.integers(9, size=(2 * batch_size, *size), dtype=np.uint8),
        slices_of_class=(),
    )
    optimizer = make_optimizer(model, spec)
    begin = time.perf_counter()
    loss = train_epoch(model, optimizer, slices, recipe, 1)
    seconds = (time.perf_counter() - begin) / 2
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    frozen = [weight for weight in model.parameters() if not weight.requires_grad]
    if any(weight.grad is not None for weight in frozen):
        raise SystemExit("something frozen has a gradient; no memory is reported")
    state = [
        value for values in optimizer.state.values() for value in values.values() if isinstance(value, torch.Tensor)
    ]
    parts = {
        "frozen_bytes": sum(weight.nbytes for weight in frozen),
        "trained_bytes": sum(weight.nbytes for weight in trained),
        "gradient_bytes": sum(weight.grad.nbytes for weight in trained if weight.grad is not None),
        "optimizer_bytes": sum(value.nbytes for value in state),
    }
    return {
        "name": name,
        **parts,
        "imported_bytes": imported,
        "built_bytes": built,
        "peak_bytes": peak_bytes(),
        "seconds_a_step": round(seconds, 1),
        "loss": loss,
    }


def peak_bytes() -> int:
    """Return the peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_a_process(name: str, block: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """Run one row in a process of its own, started by a small one: a process counts what its parent had in memory."""
    options = ["--image-size", str(chosen.image_size), "--batch-size", str(chosen.batch_size)]
    command = [*python_command(Path(__file__)), "--row", name, "--block", str(block), *options]
    program = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode)"
    between = [sys.executable, "-P", "-S", "-c", program, *command]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}  # for results_file, which -P leaves out
    done = subprocess.run(between, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout)


def write_block(path: Path) -> None:
    """Write a block of LLaMA-7B's geometry with random weights, in float16."""
    from dataclasses import replace

    from medseg_trt.spec import BlockSpec
    from medseg_trt.train.block.blocks import random_block, save_block

    block = random_block(BlockSpec(), seed=0)
    save_block(replace(block, tensors={name: tensor.half() for name, tensor in block.tensors.items()}), path)


def to_markdown(result: Mapping[str, Any]) -> str:
    """Return the table and what it means."""
    lines = [
        "# Memory of a training step",
        "",
        f"Full size at {result['image_size']} x {result['image_size']} pixels, batch {result['batch_size']}, 9 "
        "classes, Adam, on the CPU; a random block of LLaMA-7B's geometry. *Peak* is the resident memory of a process "
        f"of its own over two steps, libraries included; one run each. A MiB is {MIB} bytes. *Rest* is the peak "
        "without weights, gradients and optimiser: activations, libraries and what the allocator keeps. The time of a "
        "step was taken on a machine with other work to do, and only says what to expect.",
        "",
        "| network | frozen MiB | trained MiB | gradients MiB | optimiser MiB | rest MiB | peak MiB | s a step |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        parts = [row[f"{part}_bytes"] for part in ("frozen", "trained", "gradient", "optimizer")]
        sizes = [*parts, row["peak_bytes"] - sum(parts), row["peak_bytes"]]
        figures = " | ".join(f"{size / MIB:.0f}" for size in sizes)
        lines.append(f"| {row['name']} | {figures} | {row['seconds_a_step']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure every row and write the results; with ``--row`` measure one, here."""
    parser = options(__doc__)
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--row", choices=list(ROWS))
    parser.add_argument("--block", type=Path)
    chosen = parser.parse_args()
    if chosen.row is not None:
        print(json.dumps(take_steps(chosen.row, chosen.block, chosen.image_size, chosen.batch_size)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        block = Path(folder, "block.safetensors")
        write_block(block)
        for name in ROWS:
            rows.append(in_a_process(name, block, chosen))
            print(f"{name}: {rows[-1]['peak_bytes'] / MIB:.0f} MiB", file=sys.stderr)
    result = {"image_size": chosen.image_size, "batch_size": chosen.batch_size, "rows": rows}
    publish("train_step_memory", result, to_markdown, chosen)


if __name__ == "__main__":
    main()
