"""The declaration of a CUDA kernel: its functions, launch configuration, reference and tolerance.

A kernel is NAME.cu (the code) and NAME.py (its ``KERNEL``). A ``.cu`` file contains one ``extern "C"`` function, whose
name and types are set by ``-D`` options. An ``Entry`` is one set of options, compiled to one PTX file.
"""

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Floats = NDArray[np.float64]
Scalars = Mapping[str, int]

DTYPES: Mapping[str, np.dtype[Any]] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float8_e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
    "int32": np.dtype(np.int32),
}
C_TYPES: Mapping[str, str] = {"float16": "__half", "bfloat16": "__nv_bfloat16", "float32": "float"}  # for -D SCALAR


@dataclass(frozen=True, kw_only=True, slots=True)
class FloatFormat:
    """The range and precision of a floating type."""

    fraction_bits: int
    min_exponent: int  # of the smallest normal number
    largest: float
    overflow: Literal["infinity", "saturate"]


FLOAT_FORMATS: Mapping[str, FloatFormat] = {
    "float16": FloatFormat(fraction_bits=10, min_exponent=-14, largest=65504.0, overflow="infinity"),
    "bfloat16": FloatFormat(fraction_bits=7, min_exponent=-126, largest=255 * 2.0**120, overflow="infinity"),
    "float32": FloatFormat(fraction_bits=23, min_exponent=-126, largest=(2**24 - 1) * 2.0**104, overflow="infinity"),
    "float8_e4m3": FloatFormat(fraction_bits=3, min_exponent=-6, largest=448.0, overflow="saturate"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """One argument of a kernel; the ``dtype`` of a pointer is that of its elements."""

    name: str
    kind: Literal["pointer", "int32"]
    dtype: str  # a key of DTYPES
    direction: Literal["in", "out"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One compiled function: one PTX file."""

    name: str  # "rmsnorm_float16", "add_rmsnorm_bfloat16_int8" …
    dtype: str  # of the floating inputs
    defines: Mapping[str, str]  # the -D options that select it in the .cu
    parameters: tuple[Parameter, ...]  # in order: input pointers, int32 scalars, output pointers
    min_arch: int = 80  # 75 of the kernels on images, 89 for the hardware conversion to fp8

    @property
    def symbol(self) -> str:
        """Return the name of the function in the PTX."""
        return f"medseg_{self.name}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """The expected output, in float64 and before the last rounding.

    Attributes:
        value: the exact result; for integer outputs in steps, before rounding and clamping.
        largest_term: magnitude of the largest term of the sum that ``value`` is; ``abs(value)`` without a sum.
        slack: the change of ``value`` if an earlier rounding of the contract was at a tie; mostly zero.
    """

    value: Floats
    largest_term: Floats
    slack: Floats


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """The largest allowed error of an output, with the reason for it.

    Floating outputs: ``ulps`` spacings of the output's type, at the magnitude of ``of``. Integer outputs (``ulps`` is
    0.5, the rounding itself): one step, only where the exact value is within ``tie`` times its largest term (at least
    one step) of a tie.
    """

    ulps: float
    of: Literal["output", "largest_term"] = "output"
    tie: float = 0.0
    reason: str

    def excess(self, actual: Array, expected: Expected, dtype: str) -> Floats:
        """Return the error of every element divided by the allowed error: at most 1 passes; a wrong NaN is infinite."""
        error, unit = distance(actual, expected, dtype, of=self.of)
        with np.errstate(invalid="ignore"):  # tie is 0 where the largest term may be infinite
            limit = self.ulps * unit + expected.slack + self.tie * np.maximum(1.0, expected.largest_term)
        return error / np.where(np.isfinite(limit), limit, self.ulps * unit)  # an expected NaN has no largest term


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """A kernel's contract: all that is needed to compile, launch, check and account for it."""

    name: str
    source: Path
    entries: tuple[Entry, ...]
    block: tuple[int, int, int]  # threads
    grid: Callable[[Scalars], tuple[int, int, int]]  # blocks, from the int32 scalars by name
    grid_rule: str  # as text
    shared_bytes: int  # dynamic shared memory; the static part is in the PTX
    shapes: Callable[[Scalars, Entry], dict[str, tuple[int, ...]]]  # of every array, C-contiguous
    reference: Callable[[Entry, Mapping[str, Array], Scalars], dict[str, Expected]]  # entry, inputs, scalars -> outputs
    tolerance: Mapping[str, Tolerance]  # by the output's dtype
    bytes_moved: Callable[[Scalars, Entry], int]  # minimum memory traffic
    onnx: str  # the node of domain medseg that it implements; "": none
    max_width: int | None = None

    def entry(self, name: str) -> Entry:
        """Return an entry by its name.

        Raises:
            KeyError: no entry has this name; the message lists the names.
        """
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise KeyError(f"{self.name} has no entry {name}; it has {', '.join(entry.name for entry in self.entries)}")


def pointer(name: str, dtype: str, direction: Literal["in", "out"] = "in") -> Parameter:
    """Declare an array argument."""
    return Parameter(name=name, kind="pointer", dtype=dtype, direction=direction)


def scalar(name: str) -> Parameter:
    """Declare an int32 argument; a float is passed as its bits (``float_bits``) in an argument called ``…_bits``."""
    return Parameter(name=name, kind="int32", dtype="int32", direction="in")


def float_bits(value: float) -> int:
    """Return the bits of ``value`` rounded to float32, as a signed 32-bit integer."""
    return struct.unpack("<i", struct.pack("<f", value))[0]


def float_from_bits(bits: int) -> float:
    """Return the float32 whose bits are ``bits``: the inverse of ``float_bits``."""
    return struct.unpack("<f", struct.pack("<i", bits))[0]


def rounded(value: Floats, dtype: str) -> Array:
    """Round float64 once, to the nearest, ties to even; integers and float8 saturate, NaN becomes the integer 0."""
    if dtype in FLOAT_FORMATS:
        number_format = FLOAT_FORMATS[dtype]
        if number_format.overflow == "saturate":
            value = np.clip(value, -number_format.largest, number_format.largest)
        step = spacing(value, dtype)
        steps = np.rint(value / step) * step  # ml_dtypes would round to float32 first
        with np.errstate(over="ignore"):
            return steps.astype(DTYPES[dtype])
    limits = np.iinfo(DTYPES[dtype])
    return np.clip(
        np.nan_to_num(np.rint(value), nan=0.0, posinf=limits.max, neginf=limits.min), limits.min, limits.max
    ).astype(DTYPES[dtype])


def spacing(value: Floats, dtype: str) -> Floats:
    """Return one ulp of a floating type at the magnitude of ``value``."""
    number_format = FLOAT_FORMATS[dtype]
    finite = np.where(np.isfinite(value), np.minimum(np.abs(value), number_format.largest), number_format.largest)
    exponent = np.frexp(finite)[1] - 1
    return np.ldexp(1.0, np.maximum(exponent, number_format.min_exponent) - number_format.fraction_bits)


def distance(actual: Array, expected: Expected, dtype: str, *, of: str = "output") -> tuple[Floats, Floats]:
    """Return the distance of every element from ``expected.value``, and its unit: an ulp of ``of`` or an integer step.

    An ulp of the largest term is an ulp of the value where that is larger. Beyond the largest number of a type,
    infinity counts as the next number of the type. The distance is infinite where exactly one of the two is NaN.
    """
    measured = actual.astype(np.float64)
    if dtype not in FLOAT_FORMATS:
        limits = np.iinfo(DTYPES[dtype])
        target = np.where(np.isnan(expected.value), 0.0, np.clip(expected.value, limits.min, limits.max))
        return np.abs(measured - target), np.ones_like(measured)
    number_format = FLOAT_FORMATS[dtype]
    largest = np.fmax(np.abs(expected.value), expected.largest_term)  # a sum of two terms can be twice the larger one
    unit = spacing(expected.value if of == "output" else largest, dtype)
    next_power = 2.0 ** math.frexp(number_format.largest)[1]
    past = number_format.largest if number_format.overflow == "saturate" else next_power
    with np.errstate(invalid="ignore"):
        error = np.abs(np.clip(measured, -past, past) - np.clip(expected.value, -past, past))
    nan, wanted_nan = np.isnan(measured), np.isnan(expected.value)
    return np.where(nan & wanted_nan, 0.0, np.where(nan | wanted_nan, np.inf, error)), unit


def bytes_of_shapes(shapes: Mapping[str, tuple[int, ...]], entry: Entry) -> int:
    """Return the total size of all arrays in bytes."""
    return sum(
        int(np.prod(shapes[parameter.name], dtype=np.int64)) * DTYPES[parameter.dtype].itemsize
        for parameter in entry.parameters
        if parameter.kind == "pointer"
    )
