"""Kernels broken on purpose, one line each, and the checks that have to see it: a fault that none sees is a hole.

A mutant replaces one text, found exactly once, in a copy of the kernels' sources. ``python -m gpu_free.mutants``, from
the folder ``tests``, runs them all, prints which check caught which, and ends with 1 if one is left.
"""

import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from gpu_free.host.checks import CHECKS
from gpu_free.host.host import missing

from medseg_trt.kernels import load
from medseg_trt.kernels.kernel import Entry, Kernel

COLUMNS = (15, 58, 9)  # of the table: kernel, fault, check


@dataclass(frozen=True, slots=True)
class Mutant:
    """One fault.

    Attributes:
        entry: the entry that it is shown on.
        file: where it is.
        checks: keys of ``CHECKS``, tried in this order until one sees it.
        old: the text that is replaced; it occurs once.
        new: the text in its place.
    """

    entry: str
    file: str
    checks: tuple[str, ...]
    old: str
    new: str

    @property
    def kernel(self) -> Kernel:
        """Return the kernel that it breaks, as it ships."""
        return load(kernel_name(self.entry))


# fmt: off
MUTANTS: Mapping[str, Mutant] = {
    # Barriers and shared memory.
    "missing barrier in a sum": Mutant(
        "rmsnorm_float16", "reduce.cuh", ("threads",),
        old="scratch[threadIdx.x / 32] = value;\n    __syncthreads();",
        new="scratch[threadIdx.x / 32] = value;",
    ),
    "missing barrier in a maximum": Mutant(
        "swiglu_float16_int8_token", "reduce.cuh", ("ptx",),
        old="scratch[threadIdx.x / 32] = __uint_as_float(bits);\n    __syncthreads();",
        new="scratch[threadIdx.x / 32] = __uint_as_float(bits);",
    ),
    "missing barrier before the angles are read": Mutant(
        "rotary_float16_half_table", "rotary.cu", ("host",),
        old="        __syncthreads();\n        const int places",
        new="        const int places",
    ),
    "shared memory used again without a barrier": Mutant(
        "layernorm_quant_float16_int8", "reduce.cuh", ("threads",),
        old="total = __fadd_rn(total, scratch[warp]);\n    __syncthreads();",
        new="total = __fadd_rn(total, scratch[warp]);",
    ),
    "chunk of angles replaced without a barrier": Mutant(
        "rotary_float32_interleaved_frequency", "rotary.cu", ("threads",),
        old="__syncthreads();  // before the next chunk's angles",
        new="",
    ),
    "barrier that some threads skip": Mutant(
        "rmsnorm_float16", "rmsnorm.cu", ("host",),
        old="if (row >= rows) return;",
        new="if (row >= rows || threadIdx.x >= width) return;",
    ),
    "every thread writes the scale": Mutant(
        "layernorm_quant_float16_int8_token", "layernorm_quant.cu", ("threads",),
        old="if (threadIdx.x == 0) *token_scale = scale;",
        new="*token_scale = scale;",
    ),
    # Shuffles.
    "wrong shuffle mask": Mutant(
        "rmsnorm_float16", "reduce.cuh", ("host",),
        old="0xffffffffu",
        new="0x0000ffffu",
    ),
    "half the shuffle tree of a sum": Mutant(
        "add_rmsnorm_float16", "reduce.cuh", ("ptx",),
        old="distance = 16; distance > 0; distance /= 2) {\n        value = __fadd_rn",
        new="distance = 8; distance > 0; distance /= 2) {\n        value = __fadd_rn",
    ),
    "half the shuffle tree of a maximum": Mutant(
        "rmsnorm_float32_int8_token", "reduce.cuh", ("host",),
        old="distance = 16; distance > 0; distance /= 2) {\n        value = max",
        new="distance = 8; distance > 0; distance /= 2) {\n        value = max",
    ),
    "last warp left out of the sum": Mutant(
        "add_rmsnorm_float16", "reduce.cuh", ("host",),
        old="warp < WARPS; ++warp) total",
        new="warp < WARPS - 1; ++warp) total",
    ),
    # Memory.
    "out-of-bounds vector load": Mutant(
        "add_rmsnorm_float16", "add_rmsnorm.cu", ("host",),
        old="const bool vector = width % LANES == 0 && ",
        new="const bool vector = ",
    ),
    "out-of-bounds vector load of gate and up": Mutant(
        "swiglu_float16", "swiglu.cu", ("ptx",),
        old="const bool vector = width % LANES == 0 && ",
        new="const bool vector = ",
    ),
    "out-of-bounds store at the end of a picture": Mutant(
        "image_to_tensor_float16", "image_to_tensor.cu", ("host",),
        old="pixel < min(plane, tile + static_cast<int>(blockDim.x) * STRIP)",
        new="pixel < tile + static_cast<int>(blockDim.x) * STRIP",
    ),
    "misaligned load": Mutant(
        "layernorm_quant_float16_int8", "layernorm_quant.cu", ("unaligned",),
        old="&& aligned<LANES>(bias) ",
        new="",
    ),
    "misaligned store of labels": Mutant(
        "logits_to_mask_float16", "logits_to_mask.cu", ("unaligned",),
        old="const size_t addresses = reinterpret_cast<size_t>(picture) | reinterpret_cast<size_t>(to);",
        new="const size_t addresses = reinterpret_cast<size_t>(picture);",
    ),
    "lost alignment of a row": Mutant(
        "rmsnorm_float16", "rmsnorm.cu", ("traffic",),
        old="const bool vector = width % LANES == 0 && ",
        new="const bool vector = width % LANES == 0 && width < 0 && ",
    ),
    "lost alignment of a head": Mutant(
        "rotary_float16_half_table", "rotary.cu", ("traffic",),
        old="const bool vector = ",
        new="const bool vector = tokens < 0 && ",
    ),
    "lost alignment of a picture": Mutant(
        "image_to_tensor_float16", "image_to_tensor.cu", ("traffic",),
        old="const bool as_it_is = ",
        new="const bool as_it_is = batch < 0 && ",
    ),
    "lost alignment of the logits": Mutant(
        "logits_to_mask_float16", "logits_to_mask.cu", ("traffic",),
        old="const bool as_it_is = ",
        new="const bool as_it_is = batch < 0 && ",
    ),
    "row kept in local memory": Mutant(
        "rmsnorm_float16", "rmsnorm.cuh", ("static",),
        old="OUTPUT results[RUNS][RUN];\n#pragma unroll",
        new="OUTPUT results[RUNS][RUN];\n#pragma unroll 1",
    ),
    "registers not filled up beyond the row": Mutant(
        "rmsnorm_float16", "elements.cuh", ("ptx",),
        old="values[r][k] = T{};",
        new="(void)values;",
    ),
    # Arithmetic of the norms.
    "epsilon outside the root": Mutant(
        "rmsnorm_float16", "rmsnorm.cuh", ("host",),
        old="__fsqrt_rn(__fadd_rn(mean, norm.epsilon))",
        new="__fadd_rn(__fsqrt_rn(mean), norm.epsilon)",
    ),
    "epsilon outside the root of the variance": Mutant(
        "layernorm_quant_float16_int8", "layernorm_quant.cu", ("host",),
        old="__fsqrt_rn(__fadd_rn(variance, norm.epsilon))",
        new="__fadd_rn(__fsqrt_rn(variance), norm.epsilon)",
    ),
    "lost row tail": Mutant(
        "rmsnorm_float16", "rmsnorm.cuh", ("host",),
        old="const int width = norm.width;",
        new="const int width = norm.width / LANES * LANES;",
    ),
    "lost row tail of gate and up": Mutant(
        "swiglu_float16", "swiglu.cu", ("host",),
        old="column < width; column += THREADS * RUN",
        new="column < width / LANES * LANES; column += THREADS * RUN",
    ),
    "zeros beyond the row counted in the variance": Mutant(
        "layernorm_quant_float16_int8", "layernorm_quant.cu", ("host",),
        old="const bool inside = Part::column(tile, k / RUN) < width;",
        new="const bool inside = true;",
    ),
    "variance from the unrounded sum": Mutant(
        "add_rmsnorm_float16", "rmsnorm.cuh", ("host",),
        old="const float value = widen(kept[k / RUN][k % RUN]);",
        new=(
            "const int c = Part::column(tile, k / RUN) + k % RUN; const float value = c < width ? "
            "__fadd_rn(widen(row.x[c]), widen(row.residual[c])) : 0.0f;"
        ),
    ),
    "quotient not rounded before the weight": Mutant(
        "rmsnorm_float16", "rmsnorm.cuh", ("host",),
        old="result = widen(narrow<SCALAR>(result));",
        new="",
    ),
    # 8 bits.
    "scale not inverted": Mutant(
        "rmsnorm_float16_int8", "rmsnorm.cuh", ("host",),
        old="__fdiv_rn(result, scale)",
        new="__fmul_rn(result, scale)",
    ),
    "halves rounded up instead of to even": Mutant(
        "swiglu_float16_int8", "elements.cuh", ("ties",),
        old="__float2int_rn(value)",
        new="__float2int_rn(floorf(value + 0.5f))",
    ),
    "int8 saturation lost": Mutant(
        "layernorm_quant_float16_int8", "elements.cuh", ("host",),
        old="min(max(__float2int_rn(value), -128), 127)",
        new="__float2int_rn(value)",
    ),
    "float8 saturation lost": Mutant(
        "swiglu_float16_fp8", "elements.cuh", ("host",),
        old="__NV_SATFINITE",
        new="__NV_NOSAT",
    ),
    # SwiGLU.
    "gate and up swapped": Mutant(
        "swiglu_float16", "swiglu.cu", ("host",),
        old="silu_times(widen(gates[k]), widen(ups[k]))",
        new="silu_times(widen(ups[k]), widen(gates[k]))",
    ),
    "exponential of gates beyond its range": Mutant(
        "swiglu_float16", "swiglu.cu", ("host",),
        old="magnitude > -SMALLEST_GATE ? 0.0f : ",
        new="",
    ),
    # Rotary.
    "wrong rotary pair": Mutant(
        "rotary_float16_interleaved_table", "rotary.cu", ("host",),
        old="STEP = 2, PARTNER = 1;",
        new="STEP = 1, PARTNER = PAIRS;",
    ),
    "wrong rotary sign": Mutant(
        "rotary_float16_half_table", "rotary.cu", ("host",),
        old="-__fmul_rn(y, sines[k])",
        new="__fmul_rn(y, sines[k])",
    ),
    "wrong key and value head": Mutant(
        "rotary_float16_half_table", "rotary.cu", ("host",),
        old="value = key - heads.key;",
        new="value = head - heads.key;",
    ),
    "positions not begun again in the next sequence": Mutant(
        "rotary_float16_half_table", "rotary.cu", ("host",),
        old="first_position + token;",
        new="first_position + blockIdx.x;",
    ),
    "heads written token by token": Mutant(
        "rotary_float16_half_table", "rotary.cu", ("host",),
        old="q + head * stride, half",
        new="q + head * heads.dim, half",
    ),
    "next sequence written over the first": Mutant(
        "rotary_float16_half_table", "rotary.cu", ("host",),
        old="v + item * num_kv_heads * stride + place",
        new="v + place",
    ),
    "frequencies cut to 32 bits": Mutant(
        "rotary_float32_half_frequency", "rotary.cu", ("host",),
        old="(upper << 32 | lower)",
        new="(upper << 32)",
    ),
    # Pictures and masks.
    "antialias support wrong": Mutant(
        "image_to_tensor_float16", "image_to_tensor.cu", ("host",),
        old="antialias ? max(width, resampled_width) : resampled_width",
        new="resampled_width",
    ),
    "picture shifted by half a pixel": Mutant(
        "image_to_tensor_float16", "image_to_tensor.cu", ("host",),
        old="(2 * target + 1) * axis.source",
        new="2 * target * axis.source",
    ),
    "channels in reverse": Mutant(
        "image_to_tensor_float32", "image_to_tensor.cu", ("host",),
        old="* SOURCE + channel % SOURCE]",
        new="* SOURCE + (CHANNELS - 1 - channel) % SOURCE]",
    ),
    "mask shifted by half a pixel": Mutant(
        "logits_to_mask_float16", "logits_to_mask.cu", ("host",),
        old="(2 * pixel + 1) * axis.resampled",
        new="2 * pixel * axis.resampled",
    ),
    "equal logits go to the higher label": Mutant(
        "logits_to_mask_float16", "logits_to_mask.cu", ("ties",),
        old="if (value > best[start + k]) labels",
        new="if (value >= best[start + k]) labels",
    ),
    "wrong threshold of one class": Mutant(
        "logits_to_mask_float16", "logits_to_mask.cu", ("host",),
        old="float best = 0.0f;",
        new="float best = 0.5f;",
    ),
    "first of several classes held against zero": Mutant(
        "logits_to_mask_float16", "logits_to_mask.cu", ("host",),
        old="value > best || (index == 0 && classes > 1)",
        new="value > best",
    ),
}
# fmt: on
SOUND = tuple(dict.fromkeys((mutant.entry, check) for mutant in MUTANTS.values() for check in mutant.checks))


def kernel_name(entry: str) -> str:
    """Return the kernel of an entry's name, which begins with it and the type."""
    return entry.split("_float")[0].split("_bfloat")[0]


def break_kernel(mutant: Mutant, folder: Path) -> tuple[Kernel, Entry]:
    """Copy the sources into ``folder``, put the fault in, and return the broken kernel and its entry.

    Raises:
        ValueError: the text is not there exactly once: the kernel has changed, and the mutant with it must.
    """
    kernel = mutant.kernel
    for file in kernel.source.parent.glob("*.cu*"):
        shutil.copyfile(file, folder / file.name)
    target = folder / mutant.file
    text = target.read_text(encoding="utf-8")
    if (found := text.count(mutant.old)) != 1:
        raise ValueError(f"{mutant.file} has {found} places like {mutant.old!r}; a mutant needs one. Change the mutant")
    target.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    return replace(kernel, source=folder / kernel.source.name), kernel.entry(mutant.entry)


def catch(mutant: Mutant, folder: Path) -> tuple[str, str]:
    """Return the check that sees the fault and what it says; ("", "") if none of its checks does."""
    kernel, entry = break_kernel(mutant, folder)
    for name in mutant.checks:
        if seen := CHECKS[name](kernel, entry, mutant.kernel):
            return name, seen
    return "", ""


def main() -> int:
    """Print the table of all mutants; return 1 if one survives or the unbroken kernel fails, 2 without a compiler."""
    if reason := missing():
        print(f"nothing was checked: {reason}")
        return 2
    wrong = 0
    for entry, check in SOUND:
        kernel = load(kernel_name(entry))
        if seen := CHECKS[check](kernel, kernel.entry(entry), kernel):
            wrong += 1
            print(f"{entry}, unbroken, fails the check {check}: {seen}")
    for name, mutant in MUTANTS.items():
        with tempfile.TemporaryDirectory() as folder:
            check, seen = catch(mutant, Path(folder))
        wrong += not check
        cells = (kernel_name(mutant.entry), name, check or "NONE")
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, COLUMNS, strict=True)), seen[:70], flush=True)
    print(f"{len(MUTANTS)} mutants; survivors, and checks that unbroken kernels fail: {wrong}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
