"""The architectures besides TransUNet: Swin-UNet, DS-TransUNet and U-Net, and how a spec of any of them is read.

The tokens that pass a language block (``insert.placement``) are, in

- Swin-UNet: those of the last encoder stage, "before_norm" or "after_norm"; Pang et al. 2024 place it before the norm
- DS-TransUNet: with "before_norm" the deepest map after both encoders were fused (``change4``), which every deep path
  crosses; with "encoder" the deepest map of the first encoder before its norm. No author has done either.
- U-Net: with "before_norm" the deepest map, pixel by pixel, as LLM4Seg does it
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from medseg_trt.errors import ArtefactError
from medseg_trt.external_spec import ExternalSpec
from medseg_trt.network_spec import ModelSpec, NetworkSpec, require_multiples
from medseg_trt.spec import from_dict

Four = tuple[int, int, int, int]
STRIDE = 32  # pixels of a token of the last Swin stage: patches of 4, merged three times
DS_STRIDE = 64  # the second encoder has patches of 8
UNET_STRIDE = 16
MAX_WINDOW_SCORES = 1 << 27  # of one head and one layer; masks of shifted windows have as many values


@dataclass(frozen=True, kw_only=True, slots=True)
class SwinUNetSpec(NetworkSpec):
    """The architecture of a Swin-UNet; the defaults are Cao et al. 2022.

    ``window`` is the side of an attention window in tokens. None: the side of the last stage, so that this stage is one
    window, as in the published networks (7 for 224 pixels). A stage that is smaller than the window is one window.
    """

    architecture: str = "swin-unet"
    network: Literal["swin-unet"] = "swin-unet"
    width: int = 96  # of the first stage
    depths: Four = (2, 2, 2, 2)  # blocks of every stage; the decoder's stages have as many
    num_heads: Four = (3, 6, 12, 24)
    window: int | None = None
    drop_path: float = 0.2  # of the last encoder block

    def check_sizes(self) -> None:
        """Raise ValueError where the network cannot have these sizes, and name image sizes that it can have."""
        require_swin_sizes(self.width, self.depths, self.num_heads, self.drop_path)
        if self.window is not None and self.window < 1:
            raise ValueError(f"the window is {self.window} tokens; it must be at least 1")
        require_multiples(self.image_size, STRIDE)
        for stage in range(4):
            rows, columns = self.grid_of(stage)
            window = self.window_of(stage)
            if rows % window or columns % window:
                step = STRIDE * (self.window or min(self.image_size) // STRIDE)
                size = " x ".join(str(max(round(pixels / step), 1) * step) for pixels in self.image_size)
                raise ValueError(
                    f"{self.image_size[0]} x {self.image_size[1]} pixels make {rows} x {columns} tokens in stage "
                    f"{stage + 1}, which windows of {window} x {window} do not divide; try {size}"
                )
            _require_few_scores(rows * columns, window, self.image_size)

    def check_placement(self) -> None:
        """Raise ValueError where ``insert.placement`` is no place in this network."""
        _require_placement(self, "before_norm", "after_norm")

    def grid_of(self, stage: int) -> tuple[int, int]:
        """Return rows and columns of the tokens of an encoder stage, counted from 0."""
        stride = STRIDE >> (3 - stage)
        return self.image_size[0] // stride, self.image_size[1] // stride

    def window_of(self, stage: int) -> int:
        """Return the side of the windows of a stage, counted from 0."""
        return min(self.window or min(self.grid), *self.grid_of(stage))

    @property
    def token_width(self) -> int:
        """The width of the tokens that pass the language block."""
        return 8 * self.width

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the tokens that pass the language block."""
        return self.image_size[0] // STRIDE, self.image_size[1] // STRIDE

    @property
    def depth(self) -> int:
        """The largest number of layers of one kind, one after the other."""
        return max(self.depths)


@dataclass(frozen=True, kw_only=True, slots=True)
class DSTransUNetSpec(NetworkSpec):
    """The architecture of a DS-TransUNet; the defaults are the published class, DS-TransUNet-B (Lin et al. 2022).

    ``deep_supervision``: two auxiliary heads, which serve in training alone. ``auxiliary_relu``: as published, a ReLU
    follows them, so that their probabilities are never below one half.
    """

    architecture: str = "ds-transunet-b"
    network: Literal["ds-transunet"] = "ds-transunet"
    width: int = 128  # of the first encoder: patches of 4 pixels
    depths: Four = (2, 2, 18, 2)
    num_heads: Four = (4, 8, 16, 32)
    drop_path: float = 0.5
    coarse_width: int = 96  # of the second encoder: patches of 8 pixels
    coarse_depths: Four = (2, 2, 6, 2)
    coarse_num_heads: Four = (3, 6, 12, 24)
    coarse_drop_path: float = 0.2
    window: int = 7  # of both; maps are padded to a multiple
    decoder_width: int = 128
    decoder_head_width: int = 64
    decoder_drop_path: float = 0.2
    groups: int = 32  # of every GroupNorm
    deep_supervision: bool = True
    auxiliary_relu: bool = True

    def check_sizes(self) -> None:
        """Raise ValueError where the network cannot have these sizes, and name image sizes that it can have."""
        require_multiples(self.image_size, DS_STRIDE)
        require_swin_sizes(self.width, self.depths, self.num_heads, self.drop_path)
        require_swin_sizes(self.coarse_width, self.coarse_depths, self.coarse_num_heads, self.coarse_drop_path)
        if min(self.window, self.decoder_width, self.decoder_head_width, self.groups) < 1:
            raise ValueError("every size of a network must be at least 1")
        if self.decoder_width % (4 * self.groups) or self.decoder_width % self.decoder_head_width:
            raise ValueError(
                f"decoder_width {self.decoder_width} must be a multiple of four times groups, {4 * self.groups}, "
                f"and of decoder_head_width {self.decoder_head_width}"
            )
        patches = (self.image_size[0] // 4 + self.window) * (self.image_size[1] // 4 + self.window)
        _require_few_scores(patches, self.window, self.image_size)
        if not 0 <= self.decoder_drop_path < 1:
            raise ValueError(f"decoder_drop_path is {self.decoder_drop_path}; it must be 0 or more and less than 1")

    def check_placement(self) -> None:
        """Raise ValueError where ``insert.placement`` is no place in this network."""
        _require_placement(self, "before_norm", "encoder")

    @property
    def token_width(self) -> int:
        """The width of the tokens that pass the language block."""
        return 8 * (self.width if self.insert.placement == "encoder" else self.decoder_width)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the tokens that pass the language block."""
        return self.image_size[0] // STRIDE, self.image_size[1] // STRIDE

    @property
    def depth(self) -> int:
        """The largest number of layers of one kind, one after the other."""
        return max(*self.depths, *self.coarse_depths)


@dataclass(frozen=True, kw_only=True, slots=True)
class UNetSpec(NetworkSpec):
    """The architecture of a U-Net with BatchNorm, in one of the two forms that are in use.

    ``upsampling``: "nearest" and a convolution (LeeJunHyun, Nest-of-Unets), for multiples of 16 pixels; or a
    "transposed" convolution (milesial), for any size of at least 16 pixels.
    """

    architecture: str = "unet"
    network: Literal["unet"] = "unet"
    width: int = 64  # of the first stage
    upsampling: Literal["nearest", "transposed"] = "nearest"

    def check_sizes(self) -> None:
        """Raise ValueError where the network cannot have these sizes, and name image sizes that it can have."""
        if self.width < 1:
            raise ValueError("every size of a network must be at least 1")
        if self.upsampling == "nearest":
            require_multiples(self.image_size, UNET_STRIDE)
        elif min(self.image_size) < UNET_STRIDE:
            raise ValueError(f"the image is {min(self.image_size)} pixels on a side; try {UNET_STRIDE}, the least")

    def check_placement(self) -> None:
        """Raise ValueError where ``insert.placement`` is no place in this network."""
        _require_placement(self, "before_norm")

    @property
    def token_width(self) -> int:
        """The width of the tokens that pass the language block."""
        return 16 * self.width

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the tokens that pass the language block."""
        return self.image_size[0] // UNET_STRIDE, self.image_size[1] // UNET_STRIDE

    @property
    def depth(self) -> int:
        """The largest number of layers of one kind, one after the other."""
        return 1


NETWORKS: Mapping[str, type[NetworkSpec]] = {  # by the field ``network``, which a TransUNet's spec does not have
    "transunet": ModelSpec,
    "swin-unet": SwinUNetSpec,
    "ds-transunet": DSTransUNetSpec,
    "unet": UNetSpec,
    "external": ExternalSpec,
}


class _ByNetwork:
    """Tells pydantic which class of ``NETWORKS`` a spec is of."""

    def __get_pydantic_core_schema__(self, source: object, handler: Callable[[object], Any]) -> Any:
        from pydantic_core import core_schema

        choices = {name: handler(kind) for name, kind in NETWORKS.items()}
        return core_schema.tagged_union_schema(choices, discriminator=_network_of)


AnyNetworkSpec = Annotated[NetworkSpec, _ByNetwork()]  # for a field that is read from a file


def network_from_dict(data: object, source: str) -> NetworkSpec:
    """Check plain data from outside and make the spec of a network of it.

    Raises:
        ArtefactError: the network is unknown, or a field is missing, unknown, of the wrong type or out of range.
    """
    name = _network_of(data)
    if name not in NETWORKS:
        raise ArtefactError(f"{source}: no network is called {name!r}; this version knows: {', '.join(NETWORKS)}")
    return from_dict(NETWORKS[name], data, source)


def require_swin_sizes(width: int, depths: Four, num_heads: Four, drop_path: float) -> None:
    """Raise ValueError where a Swin transformer cannot have these sizes."""
    if min(width, *depths, *num_heads) < 1:
        raise ValueError("every size of a network must be at least 1")
    for stage, heads in enumerate(num_heads):
        if (width << stage) % heads:
            raise ValueError(f"stage {stage + 1} is {width << stage} wide, which is no multiple of its {heads} heads")
    if not 0 <= drop_path < 1:
        raise ValueError(f"drop_path is {drop_path}; it must be 0 or more and less than 1")


def _require_few_scores(tokens: int, window: int, image_size: tuple[int, int]) -> None:
    if tokens * window**2 > MAX_WINDOW_SCORES:
        raise ValueError(
            f"windows of {window} x {window} tokens over {image_size[0]} x {image_size[1]} pixels make "
            f"{tokens * window**2:,} scores; at most {MAX_WINDOW_SCORES:,} are allowed: take smaller images or windows"
        )


def _require_placement(spec: NetworkSpec, *choices: str) -> None:
    if spec.insert.placement not in choices:
        raise ValueError(
            f"placement={spec.insert.placement} is no place in {spec.architecture}; choose one of: {', '.join(choices)}"
        )


def _network_of(data: object) -> str:
    name = data.get("network", "transunet") if isinstance(data, dict) else getattr(data, "network", "transunet")
    return str(name)
