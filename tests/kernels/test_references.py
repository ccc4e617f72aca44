"""References of the kernels agree with PyTorch, transformers and ONNX Runtime; tolerances catch planted faults."""

from collections.abc import Callable

import ml_dtypes
import mpmath
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from medseg_trt.errors import UsageError
from medseg_trt.kernels import KERNELS, load
from medseg_trt.kernels.kernel import (
    DTYPES,
    FLOAT_FORMATS,
    Array,
    Entry,
    Expected,
    Kernel,
    Tolerance,
    float_bits,
    float_from_bits,
    rounded,
    spacing,
)
from medseg_trt.kernels.rotary import frequency_words

ROWS, WIDTH, EPSILON = 17, 333, 1e-6
TORCH = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
SIXTEEN = ("float16", "bfloat16")
TRANSFORMER = ("rmsnorm", "add_rmsnorm", "rotary", "swiglu", "layernorm_quant")


def numbers(seed: int, *shape: int, dtype: str = "float32", scale: float = 1.0) -> Array:
    """Return generated normal numbers, exact in ``dtype``."""
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32).astype(DTYPES[dtype])


def tensor(values: Array) -> torch.Tensor:
    """Return a tensor of the same type; bfloat16 by way of float32, which holds it exactly."""
    if values.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(values.astype(np.float32)).bfloat16()
    return torch.from_numpy(values)


def array(values: torch.Tensor, dtype: str) -> Array:
    return values.detach().float().numpy().astype(DTYPES[dtype])


def worst(kernel: Kernel, expected: Expected, actual: Array, dtype: str) -> float:
    """Return the largest error as a multiple of what the kernel's tolerance allows."""
    return float(kernel.tolerance[dtype].excess(actual, expected, dtype).max())


def row_scalars(**extra: int) -> dict[str, int]:
    return {"rows": ROWS, "width": WIDTH, "epsilon_bits": float_bits(EPSILON), **extra}


def llama_norm(x: Array, weight: Array, dtype: str) -> Array:
    """Normalise with transformers' own layer."""
    layer = LlamaRMSNorm(len(weight), eps=EPSILON).to(TORCH[dtype])
    layer.weight.data = tensor(weight)
    return array(layer(tensor(x)), dtype)


@pytest.mark.parametrize("scale", [1.0, 1e-3])  # at 1e-3 epsilon is as large as the mean of the squares
@pytest.mark.parametrize("dtype", TORCH)
def test_rmsnorm_is_that_of_transformers(dtype, scale):
    kernel = load("rmsnorm")
    x, weight = numbers(1, ROWS, WIDTH, dtype=dtype, scale=scale), numbers(2, WIDTH, dtype=dtype)
    expected = kernel.reference(kernel.entry(f"rmsnorm_{dtype}"), {"x": x, "weight": weight}, row_scalars())["y"]
    assert worst(kernel, expected, llama_norm(x, weight, dtype), dtype) <= 1


@pytest.mark.parametrize("dtype", TORCH)
def test_add_rmsnorm_is_that_of_transformers_after_a_sum(dtype):
    kernel = load("add_rmsnorm")
    x, residual, weight = (
        numbers(seed, *shape, dtype=dtype) for seed, shape in enumerate([(ROWS, WIDTH)] * 2 + [(WIDTH,)])
    )
    inputs = {"x": x, "residual": residual, "weight": weight}
    expected = kernel.reference(kernel.entry(f"add_rmsnorm_{dtype}"), inputs, row_scalars())
    total = array(tensor(x) + tensor(residual), dtype)
    assert np.array_equal(rounded(expected["sum"].value, dtype), total)
    assert worst(kernel, expected["y"], llama_norm(total, weight, dtype), dtype) <= 1


def normalise(
    x: Array,
    weight: Array,
    dtype: str,
    *,
    mean_of: Array | None = None,
    epsilon_on_root: bool = False,
    late: bool = False,
) -> Array:
    """Normalise in float32, as the contract says or with one fault."""
    wide = x.astype(np.float32)
    mean = np.mean((wide if mean_of is None else mean_of) ** 2, axis=1, keepdims=True, dtype=np.float32)
    epsilon = np.float32(EPSILON)
    root = np.sqrt(mean) + epsilon if epsilon_on_root else np.sqrt(mean + epsilon)
    quotient = wide * (1 / root)
    quotient = quotient if late else quotient.astype(DTYPES[dtype]).astype(np.float32)
    return (quotient * weight.astype(np.float32)).astype(DTYPES[dtype])


FAULTS: dict[str, Callable[[Array, Array, Array, str], Array]] = {
    "epsilon added to the root": lambda x, r, w, d: normalise((x + r), w, d, epsilon_on_root=True),
    "variance of the unrounded sum": lambda x, r, w, d: normalise(
        x + r, w, d, mean_of=x.astype(np.float32) + r.astype(np.float32)
    ),
    "rounded only after the weight": lambda x, r, w, d: normalise(x + r, w, d, late=True),
    "the last column lost in the mean": lambda x, r, w, d: normalise(
        x + r, w, d, mean_of=np.where(np.arange(x.shape[1]) < x.shape[1] - 1, (x + r).astype(np.float32), 0)
    ),
    "no residual": lambda x, r, w, d: normalise(x, w, d),
}


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_the_tolerance_of_add_rmsnorm_catches(fault, dtype):
    kernel = load("add_rmsnorm")
    x, residual = (numbers(seed, 64, WIDTH, dtype=dtype, scale=1e-2) for seed in (5, 6))
    weight = numbers(7, WIDTH, dtype=dtype)
    inputs = {"x": x, "residual": residual, "weight": weight}
    expected = kernel.reference(kernel.entry(f"add_rmsnorm_{dtype}"), inputs, {**row_scalars(), "rows": 64})["y"]
    actual = FAULTS[fault](x, residual, weight, dtype) if fault else normalise(x + residual, weight, dtype)
    assert (worst(kernel, expected, actual, dtype) > 1) is bool(fault)


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_with_a_weight_of_ones_rmsnorm_rounds_once(dtype):
    kernel = load("rmsnorm")
    x, weight = numbers(8, ROWS, WIDTH, dtype=dtype), np.ones(WIDTH, DTYPES[dtype])
    actual = normalise(x, weight, dtype).astype(np.float64)
    wide = x.astype(np.float64)
    exact = wide / np.sqrt(np.mean(wide * wide, axis=1, keepdims=True) + float_from_bits(float_bits(EPSILON)))
    assert np.max(np.abs(actual - exact) / spacing(exact, dtype)) <= 0.505
    expected = kernel.reference(kernel.entry(f"rmsnorm_{dtype}"), {"x": x, "weight": weight}, row_scalars())["y"]
    assert np.max(np.abs(expected.value - exact) / spacing(exact, dtype)) <= 0.5


def test_a_row_beyond_float32_becomes_zero_as_in_transformers():
    kernel = load("rmsnorm")
    x, weight = np.full((1, 8), 1e30, np.float32), np.ones(8, np.float32)
    expected = kernel.reference(kernel.entry("rmsnorm_float32"), {"x": x, "weight": weight}, row_scalars())["y"]
    assert not expected.value.any()
    assert not llama_norm(x, weight, "float32").any()


@pytest.mark.parametrize("special", [np.inf, np.nan])
def test_rmsnorm_reference_propagates_inf_and_nan_as_transformers(special):
    kernel = load("rmsnorm")
    x, weight = numbers(9, ROWS, WIDTH), numbers(10, WIDTH)
    x[3, 5] = special
    expected = kernel.reference(kernel.entry("rmsnorm_float32"), {"x": x, "weight": weight}, row_scalars())["y"]
    actual = llama_norm(x, weight, "float32")
    assert np.array_equal(np.isnan(expected.value), np.isnan(actual))
    assert worst(kernel, expected, actual, "float32") <= 1


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_swiglu_is_silu_times_up(scale):
    kernel = load("swiglu")
    gate_up = numbers(11, ROWS, 2 * WIDTH, scale=scale)
    entry = kernel.entry("swiglu_float32")
    expected = kernel.reference(entry, {"gate_up": gate_up}, {"rows": ROWS, "width": WIDTH})["y"]
    gate, up = tensor(gate_up).double().chunk(2, dim=1)
    np.testing.assert_allclose(expected.value, (F.silu(gate) * up).numpy(), rtol=1e-14)  # a few roundings of float64
    assert worst(kernel, expected, (F.silu(gate) * up).float().numpy(), "float32") <= 1


@pytest.mark.parametrize("special", [np.inf, -np.inf, np.nan, -200.0, 0.0])
@pytest.mark.parametrize("other", [np.inf, np.nan, 1.0, 0.0])
def test_swiglu_of_special_numbers_is_that_of_pytorch(special, other):
    kernel = load("swiglu")
    gate_up = np.array([[special, other]], np.float32)
    expected = kernel.reference(kernel.entry("swiglu_float32"), {"gate_up": gate_up}, {"rows": 1, "width": 1})["y"]
    actual = (F.silu(torch.tensor([[special]])) * other).numpy()
    np.testing.assert_array_equal(expected.value, actual)


def test_the_tolerance_of_swiglu_catches_a_rounding_in_between():
    kernel = load("swiglu")
    gate_up = numbers(12, 64, 2 * WIDTH, dtype="float16")
    expected = kernel.reference(kernel.entry("swiglu_float16"), {"gate_up": gate_up}, {"rows": 64, "width": WIDTH})["y"]
    gate, up = tensor(gate_up).chunk(2, dim=1)
    assert worst(kernel, expected, (F.silu(gate.float()) * up.float()).half().numpy(), "float16") <= 1
    assert worst(kernel, expected, (F.silu(gate) * up).numpy(), "float16") > 1


def rotary_case(entry: Entry, dim: int, first_position: int = 3) -> tuple[dict[str, int], dict[str, Array]]:
    """Return 2 sequences of 5 tokens with 6 heads on 2 key and value heads, and transformers' own angles."""
    scalars = {
        "batch": 2,
        "tokens": 5,
        "first_position": first_position,
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_dim": dim,
        "copy_values": 1,
    }
    embedding = LlamaRotaryEmbedding(
        LlamaConfig(hidden_size=dim, num_attention_heads=1, head_dim=dim, max_position_embeddings=64)
    )
    cos, sin = embedding(torch.zeros(1), torch.arange(first_position + 5)[None])
    tables = {"cos": cos[0, :, : dim // 2].numpy(), "sin": sin[0, :, : dim // 2].numpy()}
    inputs = {
        "qkv": numbers(13, 10, 10 * dim, dtype=entry.dtype).reshape(2, 5, -1),
        "frequencies": frequency_words(dim, 10000.0),
        **tables,
    }
    return scalars, {name: inputs[name] for name in (p.name for p in entry.parameters) if name in inputs}


@pytest.mark.parametrize("dim", [8, 22])
def test_rotary_is_that_of_transformers(dim):
    kernel = load("rotary")
    entry = kernel.entry("rotary_float32_half_table")
    scalars, inputs = rotary_case(entry, dim)
    expected = kernel.reference(entry, inputs, scalars)
    heads = tensor(inputs["qkv"]).double().reshape(2, 5, 10, dim).transpose(1, 2)  # (sequence, head, token, column)
    cos, sin = (tensor(np.tile(inputs[name][3:], 2))[None].double() for name in ("cos", "sin"))
    query, key = apply_rotary_pos_emb(heads[:, :6], heads[:, 6:8], cos, sin)
    for name, value in {"q": query, "k": key, "v": heads[:, 8:]}.items():
        np.testing.assert_allclose(expected[name].value, value, rtol=0, atol=1e-15)


def test_interleaved_rotary_multiplies_complex_numbers_as_meta_does():
    kernel = load("rotary")
    entry = kernel.entry("rotary_float32_interleaved_table")
    scalars, inputs = rotary_case(entry, 8)
    expected = kernel.reference(entry, inputs, scalars)
    heads = torch.view_as_complex(tensor(inputs["qkv"]).double().reshape(2, 5, 10, 4, 2))
    angles = torch.complex(tensor(inputs["cos"][3:]).double(), tensor(inputs["sin"][3:]).double())[:, None]
    rotated = torch.view_as_real(heads[:, :, :8] * angles).reshape(2, 5, 8, 8).transpose(1, 2)
    np.testing.assert_allclose(expected["q"].value, rotated[:, :6], rtol=0, atol=1e-15)
    np.testing.assert_allclose(expected["k"].value, rotated[:, 6:], rtol=0, atol=1e-15)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_angles_on_the_fly_are_those_of_the_table(layout):
    kernel = load("rotary")
    outputs: list[dict[str, Expected]] = []
    for angles in ("table", "frequency"):
        entry = kernel.entry(f"rotary_float32_{layout}_{angles}")
        scalars, inputs = rotary_case(entry, 8)
        outputs.append(kernel.reference(entry, inputs, scalars))
    by_table, on_the_fly = outputs
    for name in ("q", "k", "v"):  # transformers' float32 angles are below 8 and rounded three times: 1.5e-6
        np.testing.assert_allclose(on_the_fly[name].value, by_table[name].value, rtol=0, atol=6e-6)


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_angles_at_position_a_million_are_exact(theta):
    kernel = load("rotary")
    entry = kernel.entry("rotary_float32_half_frequency")
    scalars = {**rotary_case(entry, 64)[0], "first_position": 999_995, "num_heads": 1, "num_kv_heads": 0}
    qkv = np.tile(np.repeat(np.array([1, 0], np.float32), 32), (2, 5, 1))  # (1, 0) turns into (cos, sin)
    inputs = {"qkv": qkv, "frequencies": frequency_words(64, theta)}
    expected = kernel.reference(entry, inputs, scalars)["q"].value
    with mpmath.workdps(40):
        angles = [999_999 * mpmath.mpf(theta) ** (mpmath.mpf(-2 * pair) / 64) for pair in range(32)]
        exact = [float(mpmath.cos(angle)) for angle in angles] + [float(mpmath.sin(angle)) for angle in angles]
    np.testing.assert_allclose(expected[0, 0, 4], exact, rtol=0, atol=1e-12)  # 1.8e-13, and float64 of the fraction


def test_the_tolerance_of_rotary_catches_swapped_halves_and_float32_angles():
    kernel = load("rotary")
    entry = kernel.entry("rotary_float32_half_frequency")
    scalars, inputs = rotary_case(entry, 8, first_position=3)
    expected = kernel.reference(entry, inputs, scalars)["q"]
    assert worst(kernel, expected, expected.value.astype(np.float32), "float32") <= 1
    assert worst(kernel, expected, np.roll(expected.value, 4, axis=3).astype(np.float32), "float32") > 1
    far = {**scalars, "first_position": 5000}  # where transformers' float32 angles are off by up to 2.4e-4
    expected = kernel.reference(entry, inputs, far)["q"]
    table = kernel.entry("rotary_float32_half_table")
    rotated = kernel.reference(table, rotary_case(table, 8, first_position=5000)[1], far)["q"].value
    assert worst(kernel, expected, rotated.astype(np.float32), "float32") > 1


def onnx_quantise(values: Array, scale: float, dtype: int) -> Array:
    """Quantise with ONNX Runtime."""
    helper = onnx.helper
    node = helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"])
    graph = helper.make_graph(
        [node],
        "quantise",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("y", dtype, None)],
        [
            helper.make_tensor("scale", onnx.TensorProto.FLOAT, [], [scale]),
            helper.make_tensor("zero", dtype, [], [0]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": values.astype(np.float32)})[0])


@pytest.mark.parametrize("dtype", TORCH)
def test_layernorm_quant_is_layer_norm_and_quantize_linear(dtype):
    kernel = load("layernorm_quant")
    x, weight, bias = (
        numbers(seed, *shape, dtype=dtype) for seed, shape in ((14, (ROWS, WIDTH)), (15, (WIDTH,)), (16, (WIDTH,)))
    )
    scale = 0.0125  # the largest results saturate
    entry = kernel.entry(f"layernorm_quant_{dtype}_int8")
    inputs = {"x": x, "weight": weight, "bias": bias}
    expected = kernel.reference(entry, inputs, row_scalars(scale_bits=float_bits(scale)))["y"]
    exact = F.layer_norm(tensor(x).double(), (WIDTH,), tensor(weight).double(), tensor(bias).double(), eps=EPSILON)
    np.testing.assert_allclose(expected.value * float_from_bits(float_bits(scale)), exact, rtol=0, atol=1e-12)
    actual = onnx_quantise(exact.numpy(), scale, onnx.TensorProto.INT8)
    assert {-128, 127} <= set(actual.ravel().tolist())
    assert worst(kernel, expected, actual, "int8") <= 1
    assert np.mean(actual == rounded(expected.value, "int8")) > 0.999
    assert worst(kernel, expected, np.where(actual == 5, 6, actual).astype(np.int8), "int8") > 1


def test_the_row_scale_makes_the_largest_magnitude_127():
    kernel = load("layernorm_quant")
    inputs = {"x": numbers(17, ROWS, WIDTH), "weight": numbers(18, WIDTH), "bias": numbers(19, WIDTH)}
    expected = kernel.reference(kernel.entry("layernorm_quant_float32_int8_token"), inputs, row_scalars())
    x, weight, bias = (tensor(inputs[name]).double() for name in ("x", "weight", "bias"))
    exact = F.layer_norm(x, (WIDTH,), weight, bias, EPSILON)
    np.testing.assert_allclose(np.max(np.abs(expected["y"].value), axis=1), 127, rtol=1e-12)
    np.testing.assert_allclose(expected["y"].value * expected["scales"].value[:, None], exact, rtol=0, atol=1e-12)


def test_a_row_of_zeros_has_scale_zero_and_a_nan_is_not_lost():
    kernel = load("rmsnorm")
    x = numbers(20, 3, WIDTH)
    x[0], x[1, 7] = 0, np.nan
    inputs = {"x": x, "weight": np.ones(WIDTH, np.float32)}
    expected = kernel.reference(kernel.entry("rmsnorm_float32_int8_token"), inputs, {**row_scalars(), "rows": 3})
    assert expected["scales"].value[0] == 0
    assert np.isnan(expected["scales"].value[1])
    assert not rounded(expected["y"].value[:2], "int8").any()


def test_float8_is_that_of_pytorch_and_saturates():
    values = np.concatenate([np.linspace(-447, 447, 4001), np.linspace(-0.02, 0.02, 401)])
    actual = torch.from_numpy(values).float().to(torch.float8_e4m3fn).double().numpy()
    np.testing.assert_array_equal(rounded(values.astype(np.float32).astype(np.float64), "float8_e4m3"), actual)
    assert rounded(np.array([1e3, -np.inf]), "float8_e4m3").astype(float).tolist() == [448, -448]
    assert np.isnan(rounded(np.array([np.nan]), "float8_e4m3").astype(float)).all()


@pytest.mark.parametrize("dtype", TORCH)
def test_rounded_equals_numpy_rounding_of_the_dtype(dtype):
    values = numbers(21, 4000, scale=10.0) ** 9  # from below the smallest float16 to above the largest
    ties = np.float32(1) + np.arange(-9, 10, dtype=np.float32) * np.float32(
        2.0 ** -(FLOAT_FORMATS[dtype].fraction_bits + 1)
    )
    for wide in (values, ties):
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(rounded(wide.astype(np.float64), dtype), wide.astype(DTYPES[dtype]))


@pytest.mark.parametrize(
    ("actual", "value", "ratio"),
    [
        (1.0, 1.0, 0),
        (1 + 2**-10, 1 + 2**-11, 1),
        (np.inf, 65519.0, 17 / 16),
        (65504.0, 65519.0, 15 / 16),
        (np.inf, 1e9, 0),
        (-np.inf, 1e9, np.inf),
        (np.nan, np.nan, 0),
        (np.nan, 1.0, np.inf),
        (1.0, np.nan, np.inf),
    ],
)
def test_an_error_is_counted_in_ulps(actual, value, ratio):
    expected = Expected(value=np.array([value]), largest_term=np.array([abs(value)]), slack=np.zeros(1))
    excess = Tolerance(ulps=0.5, reason="").excess(np.array([actual], np.float16), expected, "float16")
    assert excess[0] == ratio if np.isfinite(ratio) else excess[0] > 1000


def test_an_integer_may_be_one_step_off_only_at_a_tie():
    expected = Expected(value=np.array([2.500001, 2.51, -129.0, np.nan]), largest_term=np.ones(4), slack=np.zeros(4))
    tolerance = Tolerance(ulps=0.5, tie=1e-5, reason="")
    assert (tolerance.excess(np.array([2, 3, -128, 0], np.int8), expected, "int8") <= 1).tolist() == [True] * 4
    assert (tolerance.excess(np.array([4, 2, 127, 1], np.int8), expected, "int8") <= 1).tolist() == [False] * 4


@pytest.mark.parametrize("name", KERNELS)
def test_a_declaration_holds_together(name):
    kernel = load(name)
    assert kernel.source.is_file()
    assert len({entry.name for entry in kernel.entries}) == len(kernel.entries)
    for entry in kernel.entries:
        order = [(p.direction == "out", p.kind == "int32") for p in entry.parameters]
        assert order == sorted(order), f"{entry.name}: inputs, then scalars, then outputs"
        assert {p.dtype for p in entry.parameters if p.direction == "out"} <= kernel.tolerance.keys()
        assert entry.defines["ENTRY"] == entry.symbol


# Bytes for each token, H = width: gpu-independent arithmetic, weights and scales aside.
@pytest.mark.parametrize(
    ("entry", "per_token", "once"),
    [
        ("rmsnorm_float16", 4 * WIDTH, 2 * WIDTH),
        ("add_rmsnorm_float16", 8 * WIDTH, 2 * WIDTH),
        ("add_rmsnorm_bfloat16_int8_token", 7 * WIDTH + 4, 2 * WIDTH),
        ("swiglu_float16", 6 * WIDTH, 0),
        ("layernorm_quant_float16_int8", 3 * WIDTH, 4 * WIDTH),
    ],
)
def test_bytes_moved_of_row_kernels_equals_the_minimum_traffic(entry, per_token, once):
    kernel = load(entry.split("_float16")[0].split("_bfloat16")[0])
    assert kernel.bytes_moved(row_scalars(), kernel.entry(entry)) == ROWS * per_token + once


def test_bytes_that_must_move_for_rotary():
    kernel = load("rotary")
    scalars = {**rotary_case(kernel.entries[0], 128)[0], "batch": 1, "tokens": 10, "copy_values": 0}
    assert kernel.bytes_moved(scalars, kernel.entry("rotary_float16_half_table")) == 10 * (4 * (6 + 2) * 128 + 512)
    assert kernel.bytes_moved(scalars, kernel.entry("rotary_float16_half_frequency")) == 10 * 4 * (6 + 2) * 128 + 512


def test_an_unknown_kernel_or_entry_lists_the_known_ones():
    with pytest.raises(UsageError, match=", ".join(TRANSFORMER)):
        load("rmsnrom")
    with pytest.raises(KeyError, match="rmsnorm_float16_int8_token"):
        load("rmsnorm").entry("rmsnorm_float64")
