"""Faults in arithmetic, indices and rounding, one line each."""

from collections.abc import Mapping

from gpu_free.mutant import Mutant

ARITHMETIC_MUTANTS: Mapping[str, Mutant] = {
    # Arithmetic of the norms.
    "epsilon outside the root": Mutant(
        "rmsnorm_float16",
        "rmsnorm.cuh",
        ("host",),
        old="__fsqrt_rn(__fadd_rn(mean, norm.epsilon))",
        new="__fadd_rn(__fsqrt_rn(mean), norm.epsilon)",
    ),
    "epsilon outside the root of the variance": Mutant(
        "layernorm_quant_float16_int8",
        "layernorm_quant.cu",
        ("host",),
        old="__fsqrt_rn(__fadd_rn(variance, norm.epsilon))",
        new="__fadd_rn(__fsqrt_rn(variance), norm.epsilon)",
    ),
    "lost row tail": Mutant(
        "rmsnorm_float16",
        "rmsnorm.cuh",
        ("host",),
        old="const int width = norm.width;",
        new="const int width = norm.width / LANES * LANES;",
    ),
    "lost row tail of gate and up": Mutant(
        "swiglu_float16",
        "swiglu.cu",
        ("host",),
        old="column < width; column += THREADS * RUN",
        new="column < width / LANES * LANES; column += THREADS * RUN",
    ),
    "zeros beyond the row counted in the variance": Mutant(
        "layernorm_quant_float16_int8",
        "layernorm_quant.cu",
        ("host",),
        old="const bool inside = Part::column(tile, k / RUN) < width;",
        new="const bool inside = true;",
    ),
    "variance from the unrounded sum": Mutant(
        "add_rmsnorm_float16",
        "rmsnorm.cuh",
        ("host",),
        old="const float value = widen(kept[k / RUN][k % RUN]);",
        new=(
            "const int c = Part::column(tile, k / RUN) + k % RUN; const float value = c < width ? "
            "__fadd_rn(widen(row.x[c]), widen(row.residual[c])) : 0.0f;"
        ),
    ),
    "quotient not rounded before the weight": Mutant(
        "rmsnorm_float16",
        "rmsnorm.cuh",
        ("host",),
        old="result = widen(narrow<SCALAR>(result));",
        new="",
    ),
    # 8 bits.
    "scale not inverted": Mutant(
        "rmsnorm_float16_int8",
        "rmsnorm.cuh",
        ("host",),
        old="__fdiv_rn(result, scale)",
        new="__fmul_rn(result, scale)",
    ),
    "halves rounded up instead of to even": Mutant(
        "swiglu_float16_int8",
        "elements.cuh",
        ("ties",),
        old="__float2int_rn(value)",
        new="__float2int_rn(floorf(value + 0.5f))",
    ),
    "int8 saturation lost": Mutant(
        "layernorm_quant_float16_int8",
        "elements.cuh",
        ("host",),
        old="min(max(__float2int_rn(value), -128), 127)",
        new="__float2int_rn(value)",
    ),
    "float8 saturation lost": Mutant(
        "swiglu_float16_fp8",
        "elements.cuh",
        ("host",),
        old="__NV_SATFINITE",
        new="__NV_NOSAT",
    ),
    # SwiGLU.
    "gate and up swapped": Mutant(
        "swiglu_float16",
        "swiglu.cu",
        ("host",),
        old="silu_times(widen(gates[k]), widen(ups[k]))",
        new="silu_times(widen(ups[k]), widen(gates[k]))",
    ),
    "exponential of gates beyond its range": Mutant(
        "swiglu_float16",
        "swiglu.cu",
        ("host",),
        old="magnitude > -SMALLEST_GATE ? 0.0f : ",
        new="",
    ),
    # Rotary.
    "wrong rotary pair": Mutant(
        "rotary_float16_interleaved_table",
        "rotary.cu",
        ("host",),
        old="STEP = 2, PARTNER = 1;",
        new="STEP = 1, PARTNER = PAIRS;",
    ),
    "wrong rotary sign": Mutant(
        "rotary_float16_half_table",
        "rotary.cu",
        ("host",),
        old="-__fmul_rn(y, sines[k])",
        new="__fmul_rn(y, sines[k])",
    ),
    "wrong key and value head": Mutant(
        "rotary_float16_half_table",
        "rotary.cu",
        ("host",),
        old="value = key - heads.key;",
        new="value = head - heads.key;",
    ),
    "positions not begun again in the next sequence": Mutant(
        "rotary_float16_half_table",
        "rotary.cu",
        ("host",),
        old="first_position + token;",
        new="first_position + blockIdx.x;",
    ),
    "heads written token by token": Mutant(
        "rotary_float16_half_table",
        "rotary.cu",
        ("host",),
        old="q + head * stride, half",
        new="q + head * heads.dim, half",
    ),
    "next sequence written over the first": Mutant(
        "rotary_float16_half_table",
        "rotary.cu",
        ("host",),
        old="v + item * num_kv_heads * stride + place",
        new="v + place",
    ),
    "frequencies cut to 32 bits": Mutant(
        "rotary_float32_half_frequency",
        "rotary.cu",
        ("host",),
        old="(upper << 32 | lower)",
        new="(upper << 32)",
    ),
    # Pictures and masks.
    "antialias support wrong": Mutant(
        "image_to_tensor_float16",
        "image_to_tensor.cu",
        ("host",),
        old="antialias ? max(width, resampled_width) : resampled_width",
        new="resampled_width",
    ),
    "picture shifted by half a pixel": Mutant(
        "image_to_tensor_float16",
        "image_to_tensor.cu",
        ("host",),
        old="(2 * target + 1) * axis.source",
        new="2 * target * axis.source",
    ),
    "channels in reverse": Mutant(
        "image_to_tensor_float32",
        "image_to_tensor.cu",
        ("host",),
        old="* SOURCE + channel % SOURCE]",
        new="* SOURCE + (CHANNELS - 1 - channel) % SOURCE]",
    ),
    "mask shifted by half a pixel": Mutant(
        "logits_to_mask_float16",
        "logits_to_mask.cu",
        ("host",),
        old="(2 * pixel + 1) * axis.resampled",
        new="2 * pixel * axis.resampled",
    ),
    "equal logits go to the higher label": Mutant(
        "logits_to_mask_float16",
        "logits_to_mask.cu",
        ("ties",),
        old="if (value > best[start + k]) labels",
        new="if (value >= best[start + k]) labels",
    ),
    "wrong threshold of one class": Mutant(
        "logits_to_mask_float16",
        "logits_to_mask.cu",
        ("host",),
        old="float best = 0.0f;",
        new="float best = 0.5f;",
    ),
    "first of several classes held against zero": Mutant(
        "logits_to_mask_float16",
        "logits_to_mask.cu",
        ("host",),
        old="value > best || (index == 0 && classes > 1)",
        new="value > best",
    ),
}
