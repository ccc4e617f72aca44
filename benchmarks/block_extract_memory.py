"""How much memory does it take to extract one layer of a language model of many gigabytes?

Generated checkpoints of LLaMA-7B's geometry, one in each layout, are written as sparse files: one layer holds random
numbers, and the rest is zeros that occupy no disk space. The peak resident memory of ``medseg-trt block extract`` is
compared with that of a run on a file of a few kilobytes.

    python benchmarks/block_extract_memory.py
"""

import json
import mmap
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from results_file import options, publish

from medseg_trt.files import write_json
from medseg_trt.processes import python_command
from medseg_trt.spec import BlockSpec
from medseg_trt.train.block.blocks import load_block, random_block
from medseg_trt.train.block.gguf_file import open_gguf
from medseg_trt.train.block.layer_readers import GGUF_NAMES, META_NAMES
from medseg_trt.train.block.meta_file import SPLIT_AXIS

TINY = BlockSpec(hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=4, head_dim=16)
MIB, GIB = 1 << 20, 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A generated language model."""

    spec: BlockSpec
    num_layers: int
    vocabulary: int

    def shapes(self, names: Mapping[str, str], prefix: str, others: tuple[str, str, str]) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor by its key; ``others`` are the words, the last norm and the output."""
        words = (self.vocabulary, self.spec.hidden_size)
        layer = {name: tuple(tensor.shape) for name, tensor in last_layer(self).items()}
        shapes = {others[0]: words, others[1]: (self.spec.hidden_size,), others[2]: words}
        for number in range(self.num_layers):
            shapes |= {f"{prefix}{number}.{key}": layer[name] for key, name in names.items()}
        return shapes


@lru_cache(1)
def last_layer(model: Model) -> dict[str, torch.Tensor]:
    """Return the layer that holds numbers, in float16 and with Hugging Face's names; do not change it."""
    return {name: tensor.half() for name, tensor in random_block(model.spec, seed=0).tensors.items()}


def write_safetensors(model: Model, folder: Path) -> Path:
    """Write a Hugging Face folder of one file."""
    spec, layer = model.spec, last_layer(model)
    config = {
        "model_type": "llama",
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "rms_norm_eps": spec.rms_norm_eps,
    }
    write_json(folder / "config.json", config)
    shapes = model.shapes(
        {name: name for name in layer},
        "model.layers.",
        ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"),
    )
    header, end = {}, 0
    for key, shape in shapes.items():
        begin, end = end, end + 2 * int(np.prod(shape))
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        for name, tensor in layer.items():
            file.seek(8 + len(text) + header[f"model.layers.{model.num_layers - 1}.{name}"]["data_offsets"][0])
            file.write(tensor.numpy().tobytes())
    return folder


def write_meta(model: Model, folder: Path, num_parts: int = 1) -> Path:
    """Write Meta's layout, model-parallel where there are several parts."""
    spec, layer = model.spec, dict(last_layer(model))
    params = {
        "dim": spec.hidden_size,
        "n_layers": model.num_layers,
        "n_heads": spec.num_heads,
        "multiple_of": 256,
        "norm_eps": spec.rms_norm_eps,
        "vocab_size": -1,
    }
    write_json(folder / "params.json", params)
    for name, heads in (("self_attn.q_proj.weight", spec.num_heads), ("self_attn.k_proj.weight", spec.num_kv_heads)):
        layer[name] = interleaved(layer[name], heads)
    names = ("tok_embeddings.weight", "norm.weight", "output.weight")
    for part in range(num_parts):
        path = folder / f"consolidated.{part:02}.pth"
        shapes = {
            key: share_of(shape, axis_of(key), num_parts)
            for key, shape in model.shapes(META_NAMES, "layers.", names).items()
        }
        with torch.serialization.skip_data():  # leaves holes for the values
            torch.save({key: torch.empty(shape, dtype=torch.float16) for key, shape in shapes.items()}, path)
        with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):  # what is written goes into the file
            tensors = torch.load(path, mmap=True, weights_only=True)
        for key, name in META_NAMES.items():
            axis, whole = axis_of(key), layer[name]
            share = whole if axis is None else whole.chunk(num_parts, axis)[part]
            tensors[f"layers.{model.num_layers - 1}.{key}"].copy_(share)
        del tensors
    return folder


def write_gguf(model: Model, folder: Path, kind: GGMLQuantizationType) -> Path:
    """Write a GGUF file whose matrices are of one type, with norms in float32."""
    spec, layer, path = model.spec, last_layer(model), folder / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(model.num_layers)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_feed_forward_length(spec.intermediate_size)
    writer.add_head_count(spec.num_heads)
    writer.add_layer_norm_rms_eps(spec.rms_norm_eps)
    end = 0
    names = ("token_embd.weight", "output_norm.weight", "output.weight")
    for key, shape in model.shapes(GGUF_NAMES, "blk.", names).items():
        stored = GGMLQuantizationType.F32 if key.endswith("norm.weight") else kind
        block_items, block_bytes = gguf.GGML_QUANT_SIZES[stored]
        size = int(np.prod(shape)) // block_items * block_bytes
        stored_shape = (*shape[:-1], shape[-1] // block_items * block_bytes)
        writer.add_tensor_info(key, stored_shape, np.dtype(np.uint8), size, raw_dtype=stored)
        end += -(-size // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(-(-path.stat().st_size // 32) * 32 + end)
        for key, name in GGUF_NAMES.items():
            entry, tensor = open_gguf(path).tensors[f"blk.{model.num_layers - 1}.{key}"], layer[name]
            heads = {"attn_q.weight": spec.num_heads, "attn_k.weight": spec.num_kv_heads}.get(key)
            values = (tensor if heads is None else interleaved(tensor, heads)).float().numpy()
            file.seek(entry.start)
            file.write(gguf.quants.quantize(values, GGMLQuantizationType[entry.type_name]).tobytes())
    return path


def interleaved(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder rows from half-split to interleaved rotary pairs."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)


def axis_of(key: str) -> int | None:
    """Return the axis along which Meta splits a tensor."""
    axes = {**SPLIT_AXIS, "tok_embeddings.weight": 1, "output.weight": 0}
    return next((axis for end, axis in axes.items() if key.endswith(end)), None)


def share_of(shape: tuple[int, ...], axis: int | None, num_parts: int) -> tuple[int, ...]:
    """Return the shape of one part's share."""
    return tuple(size // num_parts if number == axis else size for number, size in enumerate(shape))


LAYOUTS: Mapping[str, Callable[[Model, Path], Path]] = {
    "Hugging Face, float16": write_safetensors,
    "Meta, float16": write_meta,
    "Meta, float16 in 2 parts": lambda model, folder: write_meta(model, folder, 2),
    "GGUF, F16": lambda model, folder: write_gguf(model, folder, GGMLQuantizationType.F16),
    "GGUF, Q8_0": lambda model, folder: write_gguf(model, folder, GGMLQuantizationType.Q8_0),
}


def peak_bytes(command: list[str]) -> int:
    """Run a command and return its peak resident memory.

    A process counts what its parent had in memory when it was started, so that a small one comes in between.
    """
    program = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    between = [sys.executable, "-P", "-S", "-c", program, *command]
    return int(subprocess.run(between, check=True, stdout=subprocess.PIPE, text=True).stdout) * 1024


def extract(model: Model, write: Callable[[Model, Path], Path], folder: Path) -> dict[str, Any]:
    """Write a checkpoint, extract its last layer, and return what that took; every weight is compared first."""
    checkpoint, block = folder / "model", folder / "block.safetensors"
    checkpoint.mkdir()
    source = write(model, checkpoint)
    begin = time.perf_counter()
    peak = peak_bytes(python_command("medseg_trt", "block", "extract", "-q", str(source), "-o", str(block)))
    seconds = time.perf_counter() - begin
    check_same(model, block)
    files = [path.stat() for path in checkpoint.iterdir()]
    return {
        "checkpoint_bytes": sum(stat.st_size for stat in files),
        "checkpoint_bytes_on_disk": sum(stat.st_blocks * 512 for stat in files),
        "layer_bytes_stored": layer_bytes_stored(source, model),
        "block_bytes": block.stat().st_size,
        "peak_bytes": peak,
        "seconds": round(seconds, 1),
    }


def layer_bytes_stored(source: Path, model: Model) -> int:
    """Return how many bytes the layer has in the checkpoint."""
    if source.suffix != ".gguf":
        return sum(tensor.nbytes for tensor in last_layer(model).values())
    prefix = f"blk.{model.num_layers - 1}."
    return sum(entry.size for name, entry in open_gguf(source).tensors.items() if name.startswith(prefix))


def check_same(model: Model, block: Path) -> None:
    """Compare a block with what was written, to half a step of an eight-bit type.

    That is 1/254 of the largest of 32 values, and the step is rounded to float16: 1/220 leaves a tenth.
    """
    tensors = load_block(block)[0].tensors
    for name, expected in last_layer(model).items():
        step = 0.0 if tensors[name].dtype == torch.float16 else expected.abs().max().item() / 220
        if (tensors[name].float() - expected.float()).abs().max().item() > step:
            raise SystemExit(f"{name} is not what was written; no memory is reported")


def measure(model: Model, layouts: Mapping[str, Callable[[Model, Path], Path]]) -> Iterator[dict[str, Any]]:
    """Measure one layout after another; each checkpoint is deleted before the next is written."""
    for layout, write in layouts.items():
        runs = []
        for measured in (replace(model, spec=TINY, num_layers=2, vocabulary=32), model):
            with tempfile.TemporaryDirectory() as folder:
                runs.append(extract(measured, write, Path(folder)))
        baseline, run = runs
        added = run["peak_bytes"] - baseline["peak_bytes"]
        yield {"layout": layout, **run, "baseline_bytes": baseline["peak_bytes"], "added_bytes": added}


def to_markdown(result: Mapping[str, Any]) -> str:
    """Return the table and what it means."""
    lines = [
        "# Memory to extract one layer",
        "",
        f"Generated models of {result['num_layers']} layers, each {result['hidden_size']} wide, as sparse files. "
        "*Added* is the peak resident memory, mapped pages of files included, above that of the same command on a file "
        "of a few kilobytes.",
        "",
        "| layout | model GiB | layer stored MiB | block MiB | baseline MiB | peak MiB | added MiB | s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        sizes = ("layer_bytes_stored", "block_bytes", "baseline_bytes", "peak_bytes", "added_bytes")
        mib = " | ".join(f"{row[name] / MIB:.0f}" for name in sizes)
        lines.append(f"| {row['layout']} | {row['checkpoint_bytes'] / GIB:.1f} | {mib} | {row['seconds']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write the results."""
    parser = options(__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096, help="a multiple of 128; 4096 is LLaMA-7B")
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    chosen = parser.parse_args()
    heads = chosen.width // 128
    spec = BlockSpec(
        hidden_size=chosen.width, intermediate_size=chosen.width * 43 // 16, num_heads=heads, num_kv_heads=heads
    )
    model = Model(spec=spec, num_layers=chosen.layers, vocabulary=32000)
    rows = []
    for row in measure(model, {name: LAYOUTS[name] for name in chosen.layouts}):
        print(
            f"{row['layout']}: {row['added_bytes'] / MIB:.0f} MiB above {row['baseline_bytes'] / MIB:.0f} MiB, "
            f"{row['seconds']} s",
            file=sys.stderr,
        )
        rows.append(row)
    result = {"num_layers": chosen.layers, "hidden_size": chosen.width, "rows": rows}
    publish("block_extract_memory", result, to_markdown, chosen)


if __name__ == "__main__":
    main()
