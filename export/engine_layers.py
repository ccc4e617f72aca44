"""What an engine consists of: its layers as the builder listed them, and what was expected of them.

The words are the builder's own. Names of generated kernels say what they do in four-letter words, such as Fc and Add of
``__myl_FcAdd_myl0_69``.
"""

import re
from dataclasses import dataclass
from math import prod

SCHEMA = 1
LAYERS_SUFFIX = ".layers.json"  # of the report beside a plan
PRODUCTS = ("gemm", "correlation", "convolution", "deconvolution")  # types of layers that multiply matrices
PRODUCT_WORDS = ("Fc", "Conv", "gemm", "mha")  # parts of the names of kernels that were generated and do
CUSTOM = "custom_layer"  # a plugin
QUANTISED_DTYPES = ("Int8", "Int4", "FP8")  # what products decode before or after they multiply
COUNTERS = ("Int32", "Int64")  # sizes, which come with a free batch
MOVES = frozenset({"Move", "Tran", "Resh", "Repl", "Slic", "Cast", "Copy", "Reformat", "Conc"})  # words of kernels

_WORD = re.compile(r"[A-Z][a-z0-9]*|[a-z0-9]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineTensor:
    """What a layer reads or writes; -1 is a free size."""

    dtype: str  # the builder's word: Float, Half, Int8 …
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many numbers there are for one image."""
        return prod(max(size, 1) for size in self.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineLayer:
    """One kernel of an engine."""

    name: str
    kind: str  # the builder's word: gemm, correlation, kgen, custom_layer …
    kernel: str
    inputs: tuple[EngineTensor, ...]
    constants: tuple[EngineTensor, ...]
    outputs: tuple[EngineTensor, ...]
    nodes: tuple[str, ...]  # of the ONNX graph, that it computes or a share of
    bytes: int  # read and written for one image, if nothing stays in a cache
    macs: int = 0  # multiply-accumulates of one image, of the nodes that it multiplies for
    part: str = ""  # of the network: resnet, vit, block or decoder; of a layer without nodes, that of the one before

    @property
    def is_product(self) -> bool:
        """Whether it multiplies matrices."""
        return self.kind in PRODUCTS or any(word in words(self.name) for word in PRODUCT_WORDS)

    @property
    def only_moves(self) -> bool:
        """Whether its name says that it does nothing but copy, cut, cast or scale the numbers of a picture or token."""
        found, counts = words(self.name), all(tensor.dtype in COUNTERS for tensor in self.outputs)
        return self.kind not in PRODUCTS and not counts and bool(found) and found <= MOVES | {"Mul"}

    @property
    def decodes_weights(self) -> bool:
        """Whether it writes stored integers as floats into memory, where they are read again."""
        from_codes = any(tensor.dtype in QUANTISED_DTYPES for tensor in self.constants)
        to_floats = all(tensor.dtype in ("Float", "Half", "BFloat16") for tensor in self.outputs)
        return not self.inputs and from_codes and to_floats and not self.is_product

    @property
    def dtype(self) -> str:
        """The type that it computes in: a product that of its weight, unless it decodes it; others what they read."""
        read = [tensor.dtype for tensor in self.inputs] or [tensor.dtype for tensor in self.outputs]
        weight = max(self.constants, key=lambda tensor: tensor.elements, default=None)
        if not self.is_product or weight is None or weight.elements == 1:
            kinds = (*COUNTERS, *QUANTISED_DTYPES) if self.is_product else COUNTERS
            return next((dtype for dtype in read if dtype not in kinds), read[0] if read else "–")
        if weight.dtype not in QUANTISED_DTYPES:
            return weight.dtype
        return next((dtype for dtype in read if dtype not in QUANTISED_DTYPES), weight.dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What came of one expectation."""

    name: str
    asked: int  # how many nodes, or layers
    failed: tuple[str, ...]  # "node in part: why"

    @property
    def holds(self) -> bool:
        """Whether every answer is yes; of nothing, it is."""
        return not self.failed

    def failed_in(self, part: str) -> tuple[str, ...]:
        """Return the failures in a part of the network."""
        return tuple(each for each in self.failed if each.partition(":")[0].endswith(f" in {part}"))


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerReport:
    """The layers of an engine, and what was expected of them."""

    schema: int = SCHEMA
    layers: tuple[EngineLayer, ...]
    outcomes: tuple[Outcome, ...]
    unread: int  # lines of the builder's list in a form that is not known

    __pydantic_config__ = {"extra": "forbid"}


def words(name: str) -> frozenset[str]:
    """Return the words of a generated kernel's name, such as Fc and Add of ``__myl_FcAdd_myl0_69``."""
    match = re.match(r"_+(?:myl_)?([A-Za-z_]+?)(?:_v\d+)?_myl\d+_\d+$", name)
    return frozenset(_WORD.findall(match[1])) if match else frozenset()
