"""The specification of a network, and that of TransUNet; ``networks`` has the other networks."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from medseg_trt.spec import BlockSpec, InsertSpec

MAX_NETWORK_PIXELS = 1 << 26  # of one image as a network takes it: 8192 x 8192
PIXELS_PER_TOKEN = 16  # the R50 stage halves the image four times, and a token is one of its pixels


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkSpec(ABC):
    """The part of a specification that all networks share: image size, classes, and an optional frozen LLaMA block."""

    architecture: str  # the key of train.models.model.MODELS it was made from
    image_size: tuple[int, int]  # height, width in pixels
    num_classes: int  # 1: one sigmoid logit (lesion or not); more: softmax, class 0 is the background
    block: BlockSpec | None = None
    insert: InsertSpec = field(default_factory=InsertSpec)  # how the block is used, where there is one

    __pydantic_config__ = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if self.num_classes < 1:
            raise ValueError(f"num_classes is {self.num_classes}; it must be at least 1")
        self.check_sizes()
        rows, columns = self.image_size
        if rows * columns > MAX_NETWORK_PIXELS:
            raise ValueError(f"{rows} x {columns} pixels are too many for a network; at most {MAX_NETWORK_PIXELS:,}")
        insert, block = self.insert, self.block
        if block is None:
            if insert != InsertSpec():
                raise ValueError(f"{self.architecture} has no language block to change; choose an llm- architecture")
            return
        self.check_placement()
        if (block.rotary or block.causal) and (not insert.has_layers or insert.parts == "mlp"):
            raise ValueError("rotary and causal change the language model's attention, and this insert has none")

    @abstractmethod
    def check_sizes(self) -> None:
        """Raise ValueError where the network cannot have these sizes, and name image sizes that it can have."""

    @abstractmethod
    def check_placement(self) -> None:
        """Raise ValueError where ``insert.placement`` is not a position in this network."""

    @property
    @abstractmethod
    def token_width(self) -> int:
        """The width of the tokens that pass the language block."""

    @property
    @abstractmethod
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the tokens that pass the language block."""

    @property
    @abstractmethod
    def depth(self) -> int:
        """The largest number of layers of one kind, one after the other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec(NetworkSpec):
    """The architecture of a TransUNet, with a frozen LLaMA block inside where ``block`` is set.

    The defaults are R50-ViT-B/16 as published by Chen et al. 2021 (TransUNet). ``networks`` has the other networks'.
    """

    architecture: str = "transunet"
    resnet_width: int = 64
    resnet_units: tuple[int, int, int] = (3, 4, 9)
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_size: int = 3072
    dropout: float = 0.1
    bridge_channels: int = 512  # between the tokens and the decoder ("conv_more")
    decoder_channels: tuple[int, int, int, int] = (256, 128, 64, 16)

    def check_sizes(self) -> None:
        """Raise ValueError where the network cannot have these sizes, and name image sizes that it can have."""
        require_multiples(self.image_size, PIXELS_PER_TOKEN)
        widths = (self.resnet_width, *self.resnet_units, self.mlp_size, self.bridge_channels, *self.decoder_channels)
        if min(self.hidden_size, self.num_heads, *widths) < 1 or self.num_layers < 0:
            raise ValueError("every size of a network must be at least 1")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")

    def check_placement(self) -> None:
        """Raise ValueError where ``insert.placement`` is not a position in this network."""
        placement = self.insert.placement
        if isinstance(placement, int) and placement > self.num_layers:
            raise ValueError(f"placement is after layer {placement}; {self.architecture} has {self.num_layers}")
        if placement == "encoder":
            raise ValueError(f"placement=encoder is for ds-transunet; {self.architecture} has one encoder")

    @property
    def insert_position(self) -> int:
        """Number of stages before the insert: transformer layers, then ``encoder_norm``."""
        named = {"before_norm": self.num_layers, "after_norm": self.num_layers + 1}
        placement = self.insert.placement
        return placement if isinstance(placement, int) else named[placement]

    @property
    def token_width(self) -> int:
        """The width of the tokens that pass the language block."""
        return self.hidden_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.image_size[0] // PIXELS_PER_TOKEN, self.image_size[1] // PIXELS_PER_TOKEN

    @property
    def depth(self) -> int:
        """The largest number of layers of one kind, one after the other."""
        return max(self.num_layers, *self.resnet_units)


def require_multiples(image_size: tuple[int, int], step: int) -> None:
    """Raise ValueError where a side of an image is no multiple of ``step`` pixels, and name the nearest two."""
    for name, pixels in zip(("height", "width"), image_size, strict=True):
        if pixels <= 0 or pixels % step:
            below = max(pixels // step, 1) * step
            raise ValueError(
                f"the image {name} is {pixels} pixels; it must be a multiple of {step}: try {below} or {below + step}"
            )
