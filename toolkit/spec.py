"""Specifications of models, preprocessing, classes and builds: frozen dataclasses, without torch and NumPy.

``to_dict`` and ``from_dict`` convert them to and from JSON; every field from a file is checked, and an unknown field is
an error.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any, Literal, TypeVar

from medseg_trt.errors import ArtefactError
from medseg_trt.field_errors import field_error
from medseg_trt.palette import palette
from medseg_trt.window_spec import Windows

Spec = TypeVar("Spec")
Resize = Literal["nearest", "linear", "linear_antialias", "spline3", "spline0"]
ChannelOrder = Literal["rgb", "bgr", "grey"]
Residual = Literal["none", "in", "out", "both"]
FinalNorm = Literal["ones", "pretrained", "none"]
Placement = Literal["before_norm", "after_norm", "encoder"] | int
Weights = Literal["pretrained", "random", "shuffled", "none", "gelu", "affine"]
WITHOUT_LAYERS = ("none", "gelu", "affine")  # of Weights
Parts = Literal["full", "attention", "mlp"]
Hardware = Literal["none", "same_compute_capability", "ampere_plus"]  # of TensorRT's hardware compatibility
MapperInit = Literal["default", "trunc02"]
SPLINE_ORDERS: Mapping[str, int] = {"spline3": 3, "spline0": 0}  # of the methods of Resize that use SciPy's ``zoom``
LIBRARY_NAMES: Mapping[str, str] = {"tensorrt-rtx": "TensorRT-RTX", "tensorrt": "TensorRT"}
CUDA_WHEELS = ("13", "12")  # what the names of their wheels end with, after -cu


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockSpec:
    """The geometry of one LLaMA decoder layer, and how LLM-TransUNet runs it.

    The defaults of ``rotary`` and ``causal`` follow the published code of Jiang & Liu (MIDL 2024): no rotary embedding
    and no causal mask, so that the block is independent of the order of the tokens.
    """

    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_heads: int = 32
    num_kv_heads: int = 32
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rotary: bool = False
    causal: bool = False

    __pydantic_config__ = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if min(self.hidden_size, self.intermediate_size, self.num_heads, self.num_kv_heads, self.head_dim) < 1:
            raise ValueError("every size of a block must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} heads cannot share {self.num_kv_heads} key/value heads")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary pairs need an even number")


@dataclass(frozen=True, kw_only=True, slots=True)
class InsertSpec:
    """Position, connections and weights of the language layers in the network; the defaults are the published model.

    With ``e`` the transformer's tokens, ``M1`` and ``M2`` the trained maps to the language model's width and back,
    ``x = M1 e``, ``L`` the language layers and ``N`` the final norm, the insert returns

    - ``residual="none"``: ``M2 N(L(x))``, as published (Jiang & Liu 2024)
    - ``residual="in"``: ``M2 (N(L(x)) + x)``, around the language model, in its width
    - ``residual="out"``: ``e + M2 N(L(x))``, around both maps, in the transformer's width
    - ``residual="both"``: ``e + M2 (N(L(x)) + x)``

    ``parts`` selects what a layer computes, with ``A`` its attention, ``F`` its MLP and ``n1``, ``n2`` their norms:

    - ``parts="full"``: ``h = x + A(n1(x))``, then ``h + F(n2(h))``
    - ``parts="attention"``: ``x + A(n1(x))``
    - ``parts="mlp"``: ``x + F(n2(x))``

    ``norm`` is the RMSNorm after the last layer: its weight is all ones, as published, or that of the language model's
    final norm; with "none", ``N(x) = x``. It is never trained. Without a residual and directly before
    ``encoder_norm``, "ones" and "none" are the same function up to an eps, since a LayerNorm cancels a token's scale.

    ``placement``: the insert follows the last transformer layer and precedes ``encoder_norm``, as published; follows
    ``encoder_norm``; or follows transformer layer ``k``, counted from 1. Other networks than
    TransUNet have positions of their own, see ``networks``.

    ``weights``: "pretrained" are those of the block file. "random" are normal with a standard deviation of 0.02, and
    the layer's norms are ones. "shuffled" are those of the block file, with every tensor permuted: the same values
    without their structure. Frozen random and shuffled weights are derived from ``seed`` and the block file and are
    not in checkpoints. Three leave the layers out: with "none", ``L(x) = x``, so that only the maps and the norm
    remain; with "gelu", ``L`` is GELU, so that the maps are an MLP of the same trained parameters; with "affine", one
    trained map ``W e + b`` in the transformer's width is all there is.

    ``mapper_init``: the initialisation of ``M1`` and ``M2``: PyTorch's default for a linear layer, as published, or
    normal with a standard deviation of 0.02, truncated at ±2 (Pang et al. 2024, LM4VisualEncoding).

    ``train_only``: the second half of every training batch bypasses the insert, and so does every image after the
    training. The idea is Bai et al.'s (AAAI 2025), who drop the language model at inference; the halves are ours.

    Source: Lai et al. 2024, ``vit_llama.py`` of LLMBoostMedical, for the residuals (``llam_res`` 1, 2 and 3).
    """

    residual: Residual = "none"
    norm: FinalNorm = "ones"
    placement: Placement = "before_norm"
    weights: Weights = "pretrained"
    parts: Parts = "full"
    num_layers: int = 1  # of the language model, the last ones
    trainable: bool = False  # train the language layers; then they are in the checkpoint
    seed: int = 0  # of random and shuffled weights
    mapper_init: MapperInit = "default"
    train_only: bool = False  # drop the insert after the training; needs residual=out

    __pydantic_config__ = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if self.num_layers < 1 or self.seed < 0:
            raise ValueError("num_layers must be 1 or more and seed 0 or more; weights=none leaves all layers out")
        if isinstance(self.placement, int) and self.placement < 1:
            raise ValueError(f"placement is after layer {self.placement}; the first transformer layer is 1")
        if not self.has_layers and (self.trainable or self.parts != "full" or self.num_layers != 1):
            raise ValueError(
                f"weights={self.weights} leaves the language layers out; trainable, parts and num_layers must be unset"
            )
        if self.weights == "affine" and (self.norm != "ones" or self.residual in ("in", "both")):
            raise ValueError("weights=affine is one map; norm must be unset, and residual none or out")
        if self.train_only and (self.residual != "out" or self.weights == "affine"):
            raise ValueError("train_only drops the language block after the training; residual must be out")
        if self.weights == self.norm == "none" and self.residual in ("in", "both"):
            raise ValueError(f"weights=none and norm=none leave nothing for residual={self.residual} to bypass")

    @property
    def has_layers(self) -> bool:
        """Whether there are language layers between the maps."""
        return self.weights not in WITHOUT_LAYERS

    @property
    def needs_block_file(self) -> bool:
        """Whether weights of a language model are needed, not only its geometry."""
        return self.weights in ("pretrained", "shuffled") or self.norm == "pretrained"


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessing:
    """How decoded pixels become the network's input; the same for training, calibration and inference.

    Values are clipped to ``window`` and scaled to 0 … 1, then resized, then ``(x - mean) / std`` per channel. Without
    ``spacing_mm`` an image is stretched to ``image_size``. With it, an image of known pixel spacing is first resampled
    to that spacing and then padded with the window's lower end, or cropped, about its centre.

    "spline3" and "spline0" resize as TransUNet's protocol does: ``scipy.ndimage.zoom`` of that order with aligned
    corners for images, and order 0 for masks and for the labels of the network's output. ``mean`` and ``std`` are in
    the order of the network's channels: with "bgr" the channels of a colour image are reversed first. With "grey" the
    network was made for one channel, and colour images are refused.
    """

    image_size: tuple[int, int]  # height, width in pixels
    window: tuple[float, float] = (0.0, 255.0)  # lower and upper end; Hounsfield units for CT
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    resize: Resize = "linear_antialias"
    spacing_mm: float | None = None
    channel_order: ChannelOrder = "rgb"  # of the network's input, for colour images
    own_window: bool = False  # use each image's smallest and largest value instead of ``window``
    windows: Windows | None = None  # prepare windows of images, each as a whole image is; None: whole slices

    __pydantic_config__ = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if not all(map(isfinite, (*self.window, *self.mean, *self.std, self.spacing_mm or 1.0))):
            raise ValueError("window, mean, std and spacing_mm must be finite numbers")
        if not self.window[0] < self.window[1]:
            raise ValueError(f"the window {self.window} is empty; give its lower end first")
        if any(value <= 0 for value in self.std):
            raise ValueError(f"std {self.std} must be positive")
        if self.spacing_mm is not None and self.spacing_mm <= 0:
            raise ValueError(f"spacing_mm is {self.spacing_mm}; it must be positive")
        if self.resizes_with_splines and (self.spacing_mm is not None or self.windows is not None):
            unset = "spacing_mm" if self.spacing_mm is not None else "windows"
            raise ValueError(f"{self.resize} stretches images to image_size; {unset} must be unset")

    @property
    def resizes_with_splines(self) -> bool:
        """Whether images and labels are resized with SciPy's ``zoom``."""
        return self.resize in SPLINE_ORDERS


@dataclass(frozen=True, kw_only=True, slots=True)
class Code:
    """A coded concept, as DICOM writes it; ``scheme`` is SCT for SNOMED CT."""

    value: str
    scheme: str
    meaning: str

    __pydantic_config__ = {"extra": "forbid"}

    def __post_init__(self) -> None:
        for name, text, longest in (
            ("value", self.value, 16),
            ("scheme", self.scheme, 16),
            ("meaning", self.meaning, 64),
        ):
            if not 1 <= len(text) <= longest or "\\" in text or not text.isprintable():
                raise ValueError(f"the {name} of a code has 1 to {longest} printable characters without \\: {text!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassCode:
    """What a class is, as a DICOM segmentation states it: for example an anatomical structure, kidney, right."""

    name: str  # of the class
    category: Code
    type: Code
    modifier: Code | None = None  # for example the side

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Classes:
    """The names and colours of the labels 0, 1, 2 …; label 0 is the background."""

    names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...] = ()  # red, green, blue, 0 … 255
    codes: tuple[ClassCode, ...] = ()  # of DICOM segmentations; a class without one takes the default of its name

    __pydantic_config__ = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if len(self.names) < 2 or len(self.names) > 256:
            raise ValueError(f"{len(self.names)} class names; the background and 1 to 255 classes are possible")
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"two classes have the same name: {', '.join(self.names)}")
        if not self.colors:
            object.__setattr__(self, "colors", palette(len(self.names)))
        if len(self.colors) != len(self.names):
            raise ValueError(f"{len(self.names)} class names but {len(self.colors)} colours")
        if any(not 0 <= value <= 255 for color in self.colors for value in color):
            raise ValueError("a colour is red, green and blue from 0 to 255")
        coded = [code.name for code in self.codes]
        if len(set(coded)) < len(coded) or not set(coded) <= set(self.names[1:]):
            raise ValueError(f"codes belong to one class each, without the background: {', '.join(coded)}")

    @property
    def num_logits(self) -> int:
        """Number of logits per pixel: one for a binary task, else one per label."""
        return 1 if len(self.names) == 2 else len(self.names)


SLICES_PER_BATCH = 4  # that `infer` and `serve` send to the network, and engines are built for, unless told otherwise
MAX_BATCH = 8  # of engines


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSpec:
    """The library, the GPUs and the options of a build of engines."""

    library: str  # a key of export.tensorrt.build.LIBRARIES
    targets: tuple[str, ...]  # "sm86", "sm89" …
    opt_batch: int = 1  # batch size that the builder optimises for; the command line takes SLICES_PER_BATCH
    max_batch: int = MAX_BATCH
    workspace_gib: float | None = None  # of scratch memory on the GPU; None: the library's default
    optimization_level: int = 3  # 0 … 5: the builder's search effort for faster kernels
    plugins: bool = False  # nodes of domain medseg run our kernels instead of the library's
    stripped: bool = False  # no weights in the plan: loading refits them from the graph
    version_compatible: bool = False  # with later versions of the library of the same major version
    hardware: Hardware = "none"  # other GPUs that may run it
    reproducible: bool = False  # build in a process with fixed addresses and thread order, on one core

    __pydantic_config__ = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(f"the targets {', '.join(self.targets)} must be different ones, at least one")
        if not 1 <= self.opt_batch <= self.max_batch:
            raise ValueError(f"batches from 1 over {self.opt_batch} to {self.max_batch} are not in ascending order")
        if not 0 <= self.optimization_level <= 5:
            raise ValueError(f"the optimisation level is {self.optimization_level}; levels go from 0 to 5")
        if self.workspace_gib is not None and not 0 < self.workspace_gib < 1024:
            raise ValueError(
                f"a workspace of {self.workspace_gib} GiB is impossible; give more than 0 and less than 1024"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildSpec:
    """How a checkpoint becomes a bundle."""

    # Keys of export.precision.quantize.SCHEMES, or mixes: "vit=int8,block=w8a16".
    precisions: tuple[str, ...] = ("fp32",)
    backend: str = "auto"  # the only back-end to try; auto: all
    outputs: Literal["logits", "mask"] = "logits"  # mask: graphs also compute masks at the image's size
    max_abs_error: float = 1e-4  # fp32: of logits up to 1, or relative to the largest logit
    min_agreement: float = 0.9999  # fp32: share of pixels with the same label as PyTorch
    max_dice_drop: float = 0.005  # reduced precisions: upper end of the interval
    engines: EngineSpec | None = None  # engines for GPUs, in addition to the graphs
    block: str = "exact"  # the language block in the graphs: exact, auto, affine or narrow:r=…,k=…,heads=…
    max_block_error: float = 0.05  # of a replaced block on held-out tokens, relative to its output
    max_block_unexplained: float = 0.1  # share of the variance of its output, on the same tokens; a constant has 1

    __pydantic_config__ = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if not self.precisions or len(set(self.precisions)) < len(self.precisions):
            raise ValueError(f"the precisions {', '.join(self.precisions)} must be different ones, at least one")
        if not 0 <= self.max_dice_drop <= 1:
            raise ValueError(f"max_dice_drop is {self.max_dice_drop}; Dice goes from 0 to 1")
        if not (0 < self.max_block_error <= 1 and 0 < self.max_block_unexplained <= 1):
            raise ValueError("max_block_error and max_block_unexplained must be above 0 and at most 1")


def split_precisions(texts: Sequence[str]) -> tuple[str, ...]:
    """Return the precisions of a command line: ``fp32,vit=int8,block=w8a16`` are fp32 and a mix."""
    precisions: list[str] = []
    for text in texts:
        was_mix = False
        for word in text.replace(" ", "").split(","):
            if was_mix and "=" in word:
                precisions[-1] += f",{word}"
            else:
                precisions.append(word)
            was_mix = "=" in word
    return tuple(precisions)


def to_dict(spec: Any) -> dict[str, Any]:
    """Return a spec as plain data that JSON can hold."""
    return asdict(spec)


def from_dict(kind: type[Spec], data: object, source: str) -> Spec:
    """Check plain data from outside and convert them to a spec.

    Args:
        kind: the dataclass.
        data: parsed JSON.
        source: the name of the file, for messages.

    Raises:
        ArtefactError: a field is missing, unknown, of the wrong type or out of range.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(data)
    except ValidationError as error:
        raise ArtefactError(f"{source}: {kind.__name__} {field_error(dict(error.errors()[0]))}") from error
