"""What a model is, what it eats, what it answers and how it is built: plain frozen data, no torch, no NumPy.

Every object here is made in one place and never changed afterwards. ``to_dict`` and ``from_dict`` carry it to and from
JSON; what comes from a file is checked field by field, and an unknown field is an error.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from math import isfinite
from typing import Any, Literal, TypeVar

from medseg_trt.errors import ArtefactError

Spec = TypeVar("Spec")
Resize = Literal["nearest", "linear", "linear_antialias", "spline3", "spline0"]
ChannelOrder = Literal["rgb", "bgr"]
Residual = Literal["none", "in", "out", "both"]
FinalNorm = Literal["ones", "pretrained", "none"]
Placement = Literal["before_norm", "after_norm"] | int
Weights = Literal["pretrained", "random", "shuffled", "none"]
Parts = Literal["full", "attention", "mlp"]
Hardware = Literal["none", "same_compute_capability", "ampere_plus"]  # of TensorRT's hardware compatibility
MapperInit = Literal["default", "trunc02"]
SPLINE_ORDERS: Mapping[str, int] = {"spline3": 3, "spline0": 0}  # of the methods of Resize that are SciPy's ``zoom``
PIXELS_PER_TOKEN = 16  # the R50 stage halves the image four times, and a token is one of its pixels
LIBRARY_NAMES: Mapping[str, str] = {"tensorrt-rtx": "TensorRT-RTX", "tensorrt": "TensorRT"}
CUDA_WHEELS = ("13", "12")  # what the names of their wheels end with, after -cu


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockSpec:
    """The geometry of one LLaMA decoder layer, and how LLM-TransUNet runs it.

    The defaults of ``rotary`` and ``causal`` are the published code of Jiang & Liu (MIDL 2024): no rotary embedding and
    no causal mask, so that the block does not know the order of the tokens.
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
    """How the language layers sit in the network, and what they hold; the defaults are the published model.

    With ``e`` the transformer's tokens, ``M1`` and ``M2`` the trained maps to the language model's width and back,
    ``x = M1 e``, ``L`` the language layers and ``N`` the final norm, the insert returns

    - ``residual="none"``: ``M2 N(L(x))``, as published (Jiang & Liu 2024)
    - ``residual="in"``: ``M2 (N(L(x)) + x)``, round the language model in its own width
    - ``residual="out"``: ``e + M2 N(L(x))``, round both maps in the transformer's width
    - ``residual="both"``: ``e + M2 (N(L(x)) + x)``

    ``parts`` says what a layer computes, with ``A`` its attention, ``F`` its MLP and ``n1``, ``n2`` their norms:

    - ``parts="full"``: ``h = x + A(n1(x))``, then ``h + F(n2(h))``
    - ``parts="attention"``: ``x + A(n1(x))``
    - ``parts="mlp"``: ``x + F(n2(x))``

    ``norm`` is the RMSNorm after the last layer: its weight is all ones, as published, or that of the language model's
    own final norm; with "none", ``N(x) = x``. It is never trained. Without a residual and right before
    ``encoder_norm``, "ones" and "none" are one function but for an eps, since a LayerNorm undoes a token's scale.

    ``placement``: the tokens pass the insert after the last transformer layer and before ``encoder_norm``, as
    published; after ``encoder_norm``; or right after transformer layer ``k``, counted from 1.

    ``weights``: "pretrained" are the block file's. "random" are normal with a standard deviation of 0.02, and the
    layer's own norms ones. "shuffled" are the block file's, every tensor permuted on its own: the same values without
    their structure. "none" leaves the layers out, ``L(x) = x``, so that only the maps and the norm remain. Frozen
    random and shuffled weights follow from ``seed`` and the block file and are in no checkpoint.

    ``mapper_init``: what ``M1`` and ``M2`` start from, PyTorch's own draw for a linear map, as published, or a normal
    one with a standard deviation of 0.02, cut off at ±2 (Pang et al. 2024, LM4VisualEncoding).

    Source: Lai et al. 2024, ``vit_llama.py`` of LLMBoostMedical, for the residuals (``llam_res`` 1, 2 and 3).
    """

    residual: Residual = "none"
    norm: FinalNorm = "ones"
    placement: Placement = "before_norm"
    weights: Weights = "pretrained"
    parts: Parts = "full"
    num_layers: int = 1  # the last ones of the language model, one after the other
    trainable: bool = False  # the language layers, from the weights above; then they are in the checkpoint
    seed: int = 0  # of random and shuffled weights
    mapper_init: MapperInit = "default"

    __pydantic_config__ = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if self.num_layers < 1 or self.seed < 0:
            raise ValueError("num_layers must be 1 or more and seed 0 or more; weights=none leaves all layers out")
        if isinstance(self.placement, int) and self.placement < 1:
            raise ValueError(f"placement is after layer {self.placement}; the first transformer layer is 1")
        if self.weights == "none" and (self.trainable or self.parts != "full" or self.num_layers != 1):
            raise ValueError(
                "weights=none leaves the language layers out; trainable, parts and num_layers must be unset"
            )
        if self.weights == self.norm == "none" and self.residual in ("in", "both"):
            raise ValueError(f"weights=none and norm=none leave nothing for residual={self.residual} to go round")

    @property
    def needs_block_file(self) -> bool:
        """Whether weights of a language model are needed, or its geometry is enough."""
        return self.weights in ("pretrained", "shuffled") or self.norm == "pretrained"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """The architecture of a TransUNet, with a frozen LLaMA block inside where ``block`` is set.

    The defaults are R50-ViT-B/16 as published by Chen et al. 2021 (TransUNet).
    """

    architecture: str = "transunet"  # the key of train.models.model.MODELS it was made from
    image_size: tuple[int, int]  # height, width in pixels
    num_classes: int  # 1: one sigmoid logit (lesion or not); more: softmax, class 0 is the background
    resnet_width: int = 64
    resnet_units: tuple[int, int, int] = (3, 4, 9)
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_size: int = 3072
    dropout: float = 0.1
    bridge_channels: int = 512  # between the tokens and the decoder ("conv_more")
    decoder_channels: tuple[int, int, int, int] = (256, 128, 64, 16)
    block: BlockSpec | None = None
    insert: InsertSpec = InsertSpec()  # how the block is used, where there is one

    __pydantic_config__ = {"extra": "forbid"}

    def __post_init__(self) -> None:
        for name, pixels in zip(("height", "width"), self.image_size, strict=True):
            if pixels <= 0 or pixels % PIXELS_PER_TOKEN:
                below = max(pixels // PIXELS_PER_TOKEN, 1) * PIXELS_PER_TOKEN
                raise ValueError(
                    f"the image {name} is {pixels} pixels; it must be a multiple of {PIXELS_PER_TOKEN}: "
                    f"try {below} or {below + PIXELS_PER_TOKEN}"
                )
        if self.num_classes < 1:
            raise ValueError(f"num_classes is {self.num_classes}; it must be at least 1")
        widths = (self.resnet_width, *self.resnet_units, self.mlp_size, self.bridge_channels, *self.decoder_channels)
        if min(self.hidden_size, self.num_heads, *widths) < 1 or self.num_layers < 0:
            raise ValueError("every size of a network must be at least 1")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        self._check_insert()

    def _check_insert(self) -> None:
        insert, block = self.insert, self.block
        if block is None:
            if insert != InsertSpec():
                raise ValueError(f"{self.architecture} has no language block to change; choose an llm- architecture")
            return
        if isinstance(insert.placement, int) and insert.placement > self.num_layers:
            raise ValueError(f"placement is after layer {insert.placement}; {self.architecture} has {self.num_layers}")
        if (block.rotary or block.causal) and (insert.weights == "none" or insert.parts == "mlp"):
            raise ValueError("rotary and causal change the language model's attention, and this insert has none")

    @property
    def insert_position(self) -> int:
        """How many stages the tokens pass before the insert: the transformer's layers, then ``encoder_norm``."""
        named = {"before_norm": self.num_layers, "after_norm": self.num_layers + 1}
        placement = self.insert.placement
        return placement if isinstance(placement, int) else named[placement]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.image_size[0] // PIXELS_PER_TOKEN, self.image_size[1] // PIXELS_PER_TOKEN


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessing:
    """How decoded pixels become the network's input; one contract for training, calibration and inference.

    Values are clipped to ``window`` and scaled to 0 … 1, then resized, then ``(x - mean) / std`` per channel. Without
    ``spacing_mm`` a picture is stretched to ``image_size``. With it, a picture whose pixel spacing is known is first
    brought to that spacing and then padded with the window's lower end, or cropped, about its centre.

    With "spline3" or "spline0" pictures are resized as TransUNet's protocol does it: ``scipy.ndimage.zoom`` of that
    order, which lays the corners on one another, and masks with order 0, the network's answer as labels as well.
    ``mean`` and ``std`` are those of the network's channels: with "bgr" a coloured picture's are turned round first.
    """

    image_size: tuple[int, int]  # height, width in pixels
    window: tuple[float, float] = (0.0, 255.0)  # lower and upper end; Hounsfield units for CT
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    resize: Resize = "linear_antialias"
    spacing_mm: float | None = None
    channel_order: ChannelOrder = "rgb"  # in which the network takes the channels of a coloured picture
    own_window: bool = False  # of every image, from its smallest to its largest value, in place of ``window``

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
        if self.spacing_mm is not None and self.resizes_with_splines:
            raise ValueError(f"{self.resize} stretches pictures to image_size; spacing_mm must be unset")

    @property
    def resizes_with_splines(self) -> bool:
        """Whether pictures, masks and answers are resized with SciPy's ``zoom``, not with our own resizing."""
        return self.resize in SPLINE_ORDERS


@dataclass(frozen=True, kw_only=True, slots=True)
class Classes:
    """The names and colours of the labels 0, 1, 2 …; label 0 is the background."""

    names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...] = ()  # red, green, blue, 0 … 255

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

    @property
    def num_logits(self) -> int:
        """Channels of the network's answer: one for a binary task, else one per label."""
        return 1 if len(self.names) == 2 else len(self.names)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSpec:
    """For which GPUs engines are built, by which library, and how."""

    library: str  # a key of export.tensorrt.build.LIBRARIES
    targets: tuple[str, ...]  # "sm86", "sm89" …
    opt_batch: int = 1  # the batch that kernels are chosen for
    max_batch: int = 8
    workspace_gib: float | None = None  # of scratch memory on the GPU; None: what the library takes
    optimization_level: int = 3  # 0 … 5: how long the builder looks for better kernels
    plugins: bool = False  # nodes of domain medseg run our kernels, not what the library makes of their bodies
    stripped: bool = False  # no weights in the plan: it is refitted from the graph when it is loaded
    version_compatible: bool = False  # later versions of the library with the same major number read it
    hardware: Hardware = "none"  # which other GPUs may run it

    __pydantic_config__ = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(f"the targets {', '.join(self.targets)} must be different ones, at least one")
        if not 1 <= self.opt_batch <= self.max_batch:
            raise ValueError(f"batches from 1 over {self.opt_batch} to {self.max_batch} are not in ascending order")
        if not 0 <= self.optimization_level <= 5:
            raise ValueError(f"the optimisation level is {self.optimization_level}; levels go from 0 to 5")
        if self.workspace_gib is not None and not 0 < self.workspace_gib < 1024:
            raise ValueError(f"a workspace of {self.workspace_gib} GiB is none")


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildSpec:
    """How a checkpoint becomes a bundle."""

    precisions: tuple[str, ...] = (
        "fp32",
    )  # keys of export.precision.quantize.SCHEMES, or mixes: "vit=int8,block=w8a16"
    backend: str = "auto"  # the only back-end that is tried; auto: every one
    outputs: Literal["logits", "mask"] = "logits"  # mask: graphs that also make masks of the source's size
    max_abs_error: float = 1e-4  # of logits up to 1, or as a share of the largest, where nothing is rounded
    min_agreement: float = 0.9999  # share of pixels with the same label as PyTorch, where nothing is rounded
    max_dice_drop: float = 0.005  # upper end of its interval, where something is
    engines: EngineSpec | None = None  # engines for GPUs, beside the graphs

    __pydantic_config__ = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if not self.precisions or len(set(self.precisions)) < len(self.precisions):
            raise ValueError(f"the precisions {', '.join(self.precisions)} must be different ones, at least one")
        if not 0 <= self.max_dice_drop <= 1:
            raise ValueError(f"max_dice_drop is {self.max_dice_drop}; Dice goes from 0 to 1")


def split_precisions(texts: Sequence[str]) -> tuple[str, ...]:
    """Return the precisions of a command line: ``fp32,vit=int8,block=w8a16`` are two, fp32 and a mix of two."""
    found: list[str] = []
    for text in texts:
        was_mix = False
        for word in text.replace(" ", "").split(","):
            if was_mix and "=" in word:
                found[-1] += f",{word}"
            else:
                found.append(word)
            was_mix = "=" in word
    return tuple(found)


def palette(count: int) -> tuple[tuple[int, int, int], ...]:
    """Return ``count`` colours, at most 256, that are easy to tell apart; the first is black, for the background.

    The first ones are Okabe & Ito's colour-blind-safe set and a violet: no grey, which cannot be seen on a scan. Each
    further one is the colour that lies farthest from all before it, of a grid without dark and greyish colours.
    """
    colors = [
        (0, 0, 0),
        (230, 159, 0),
        (86, 180, 233),
        (0, 158, 115),
        (240, 228, 66),
        (0, 114, 178),
        (213, 94, 0),
        (204, 121, 167),
        (148, 0, 211),
    ][:count]
    if count > len(colors):
        levels = range(60, 256, 32)
        grid = [color for color in product(levels, levels, levels) if max(color) - min(color) >= 64]
        distances = {color: min(_distance(color, other) for other in colors) for color in grid}
        while len(colors) < count:
            farthest = max(distances, key=distances.__getitem__)
            colors.append(farthest)
            distances = {color: min(old, _distance(color, farthest)) for color, old in distances.items()}
    return tuple(colors)


def _distance(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    return sum((a - b) ** 2 for a, b in zip(first, second, strict=True))


def to_dict(spec: Any) -> dict[str, Any]:
    """Return a spec as plain data that JSON can hold."""
    return asdict(spec)


def from_dict(kind: type[Spec], data: object, source: str) -> Spec:
    """Check plain data from outside and make a spec of it.

    Args:
        kind: the dataclass to make.
        data: what was read.
        source: where it was read, for the message.

    Raises:
        ArtefactError: a field is missing, unknown, of the wrong type or out of range.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ArtefactError(f"{source}: {kind.__name__} {where}: {first['msg']}") from error
