"""Faults in barriers, shuffles and accesses to memory, one line each."""

from collections.abc import Mapping

from gpu_free.mutant import Mutant

MEMORY_MUTANTS: Mapping[str, Mutant] = {
    # Barriers and shared memory.
    "missing barrier in a sum": Mutant(
        "rmsnorm_float16",
        "reduce.cuh",
        ("threads",),
        old="scratch[threadIdx.x / 32] = value;\n    __syncthreads();",
        new="scratch[threadIdx.x / 32] = value;",
    ),
    "missing barrier in a maximum": Mutant(
        "swiglu_float16_int8_token",
        "reduce.cuh",
        ("ptx",),
        old="scratch[threadIdx.x / 32] = __uint_as_float(bits);\n    __syncthreads();",
        new="scratch[threadIdx.x / 32] = __uint_as_float(bits);",
    ),
    "missing barrier before the angles are read": Mutant(
        "rotary_float16_half_table",
        "rotary.cu",
        ("host",),
        old="        __syncthreads();\n        const int places",
        new="        const int places",
    ),
    "shared memory used again without a barrier": Mutant(
        "layernorm_quant_float16_int8",
        "reduce.cuh",
        ("threads",),
        old="total = __fadd_rn(total, scratch[warp]);\n    __syncthreads();",
        new="total = __fadd_rn(total, scratch[warp]);",
    ),
    "chunk of angles replaced without a barrier": Mutant(
        "rotary_float32_interleaved_frequency",
        "rotary.cu",
        ("threads",),
        old="__syncthreads();  // before the next chunk's angles",
        new="",
    ),
    "barrier that some threads skip": Mutant(
        "rmsnorm_float16",
        "rmsnorm.cu",
        ("host",),
        old="if (row >= rows) return;",
        new="if (row >= rows || threadIdx.x >= width) return;",
    ),
    "every thread writes the scale": Mutant(
        "layernorm_quant_float16_int8_token",
        "layernorm_quant.cu",
        ("threads",),
        old="if (threadIdx.x == 0) *token_scale = scale;",
        new="*token_scale = scale;",
    ),
    # Shuffles.
    "wrong shuffle mask": Mutant(
        "rmsnorm_float16",
        "reduce.cuh",
        ("host",),
        old="0xffffffffu",
        new="0x0000ffffu",
    ),
    "half the shuffle tree of a sum": Mutant(
        "add_rmsnorm_float16",
        "reduce.cuh",
        ("ptx",),
        old="distance = 16; distance > 0; distance /= 2) {\n        value = __fadd_rn",
        new="distance = 8; distance > 0; distance /= 2) {\n        value = __fadd_rn",
    ),
    "half the shuffle tree of a maximum": Mutant(
        "rmsnorm_float32_int8_token",
        "reduce.cuh",
        ("host",),
        old="distance = 16; distance > 0; distance /= 2) {\n        value = max",
        new="distance = 8; distance > 0; distance /= 2) {\n        value = max",
    ),
    "last warp left out of the sum": Mutant(
        "add_rmsnorm_float16",
        "reduce.cuh",
        ("host",),
        old="warp < WARPS; ++warp) total",
        new="warp < WARPS - 1; ++warp) total",
    ),
    # Memory.
    "out-of-bounds vector load": Mutant(
        "add_rmsnorm_float16",
        "add_rmsnorm.cu",
        ("host",),
        old="const bool vector = width % LANES == 0 && ",
        new="const bool vector = ",
    ),
    "out-of-bounds vector load of gate and up": Mutant(
        "swiglu_float16",
        "swiglu.cu",
        ("ptx",),
        old="const bool vector = width % LANES == 0 && ",
        new="const bool vector = ",
    ),
    "out-of-bounds store at the end of a picture": Mutant(
        "image_to_tensor_float16",
        "image_to_tensor.cu",
        ("host",),
        old="pixel < plane; pixel",
        new="pixel <= plane; pixel",
    ),
    "misaligned load": Mutant(
        "layernorm_quant_float16_int8",
        "layernorm_quant.cu",
        ("unaligned",),
        old="&& aligned<LANES>(bias) ",
        new="",
    ),
    "misaligned store of labels": Mutant(
        "logits_to_mask_float16",
        "logits_to_mask.cu",
        ("unaligned",),
        old="const size_t addresses = reinterpret_cast<size_t>(picture) | reinterpret_cast<size_t>(to);",
        new="const size_t addresses = reinterpret_cast<size_t>(picture);",
    ),
    "only the first pixel of each thread of a misaligned picture": Mutant(
        "logits_to_mask_float16",
        "logits_to_mask.cu",
        ("unaligned",),
        old="pixel += gridDim.x * blockDim.x",
        new="pixel += plane",
    ),
    "lost alignment of a row": Mutant(
        "rmsnorm_float16",
        "rmsnorm.cu",
        ("traffic",),
        old="const bool vector = width % LANES == 0 && ",
        new="const bool vector = width % LANES == 0 && width < 0 && ",
    ),
    "lost alignment of a head": Mutant(
        "rotary_float16_half_table",
        "rotary.cu",
        ("traffic",),
        old="const bool vector = ",
        new="const bool vector = tokens < 0 && ",
    ),
    "lost alignment of a picture": Mutant(
        "image_to_tensor_float16",
        "image_to_tensor.cu",
        ("traffic",),
        old="const bool as_it_is = ",
        new="const bool as_it_is = batch < 0 && ",
    ),
    "lost alignment of the logits": Mutant(
        "logits_to_mask_float16",
        "logits_to_mask.cu",
        ("traffic",),
        old="const bool as_it_is = ",
        new="const bool as_it_is = batch < 0 && ",
    ),
    "row kept in local memory": Mutant(
        "rmsnorm_float16",
        "rmsnorm.cuh",
        ("static",),
        old="OUTPUT results[RUNS][RUN];\n#pragma unroll",
        new="OUTPUT results[RUNS][RUN];\n#pragma unroll 1",
    ),
    "registers not filled up beyond the row": Mutant(
        "rmsnorm_float16",
        "elements.cuh",
        ("ptx",),
        old="values[r][k] = T{};",
        new="(void)values;",
    ),
}
