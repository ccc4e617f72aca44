"""The architectures by name: the published networks, smaller ones for demos, and tiny ones for tests.

Every network has a counterpart with a frozen LLaMA layer inside, called ``llm-…``.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

from medseg_trt.network_spec import ModelSpec, NetworkSpec
from medseg_trt.networks import DSTransUNetSpec, SwinUNetSpec, UNetSpec
from medseg_trt.spec import BlockSpec

LLAMA_7B = BlockSpec()
SMOLLM2_135M = BlockSpec(
    hidden_size=576, intermediate_size=1536, num_heads=9, num_kv_heads=3, head_dim=64, rms_norm_eps=1e-5, rope_theta=1e5
)
TINY_LLAMA = BlockSpec(hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2, head_dim=16)

Size = tuple[int, int]
Preset = Callable[[Size, int], NetworkSpec]


def transunet(image_size: Size, num_classes: int) -> ModelSpec:
    """R50-ViT-B/16 as published: 105 million parameters."""
    return ModelSpec(architecture="transunet", image_size=image_size, num_classes=num_classes)


def transunet_small(image_size: Size, num_classes: int) -> ModelSpec:
    """A TransUNet that a laptop's CPU trains in minutes."""
    return ModelSpec(
        architecture="transunet-small",
        image_size=image_size,
        num_classes=num_classes,
        resnet_width=32,
        resnet_units=(2, 2, 2),
        hidden_size=192,
        num_layers=4,
        num_heads=6,
        mlp_size=384,
        dropout=0.1,
        bridge_channels=128,
        decoder_channels=(96, 64, 32, 16),
    )


def transunet_tiny(image_size: Size, num_classes: int) -> ModelSpec:
    """A TransUNet for tests, which runs in milliseconds."""
    return ModelSpec(
        architecture="transunet-tiny",
        image_size=image_size,
        num_classes=num_classes,
        resnet_width=32,
        resnet_units=(1, 1, 1),
        hidden_size=48,
        num_layers=2,
        num_heads=4,
        mlp_size=64,
        bridge_channels=32,
        decoder_channels=(32, 16, 16, 16),
    )


def unet(image_size: Size, num_classes: int) -> UNetSpec:
    """U-Net with nearest-pixel upsampling: 34.5 million parameters."""
    return UNetSpec(image_size=image_size, num_classes=num_classes)


def unet_t(image_size: Size, num_classes: int) -> UNetSpec:
    """U-Net with transposed convolutions: 31 million parameters."""
    return UNetSpec(architecture="unet-t", image_size=image_size, num_classes=num_classes, upsampling="transposed")


def swin_unet(image_size: Size, num_classes: int) -> SwinUNetSpec:
    """Swin-UNet as published: 27 million parameters."""
    return SwinUNetSpec(image_size=image_size, num_classes=num_classes)


def ds_transunet_b(image_size: Size, num_classes: int) -> DSTransUNetSpec:
    """DS-TransUNet-B, the published class: Swin-B and Swin-T, 171 million parameters."""
    return DSTransUNetSpec(image_size=image_size, num_classes=num_classes)


def ds_transunet_l(image_size: Size, num_classes: int) -> DSTransUNetSpec:
    """DS-TransUNet-L, which the authors' code does not have: B with Swin-L, 288 million parameters."""
    return replace(
        ds_transunet_b(image_size, num_classes), architecture="ds-transunet-l", width=192, num_heads=(6, 12, 24, 48)
    )


def sized(preset: Preset, name: str, **sizes: object) -> Preset:
    """Return a network of another size and name."""

    def preset_of_size(image_size: Size, num_classes: int) -> NetworkSpec:
        return replace(preset(image_size, num_classes), architecture=name, **sizes)

    return preset_of_size


def with_block(preset: Preset, block: BlockSpec) -> Preset:
    """Return a network with a language block inside: LLM-TransUNet is that of TransUNet."""

    def preset_with_block(image_size: Size, num_classes: int) -> NetworkSpec:
        spec = preset(image_size, num_classes)
        return replace(spec, architecture=f"llm-{spec.architecture}", block=block)

    return preset_with_block


PUBLISHED: Mapping[str, Preset] = {
    "transunet": transunet,
    "unet": unet,
    "unet-t": unet_t,
    "swin-unet": swin_unet,
    "ds-transunet-b": ds_transunet_b,
    "ds-transunet-l": ds_transunet_l,
}
SMALL: Mapping[str, Preset] = {  # a laptop's CPU trains them in minutes
    "transunet-small": transunet_small,
    "unet-small": sized(unet, "unet-small", width=16),
    "unet-t-small": sized(unet_t, "unet-t-small", width=16),
    "swin-unet-small": sized(swin_unet, "swin-unet-small", width=48),
    "ds-transunet-small": sized(
        ds_transunet_b,
        "ds-transunet-small",
        width=48,
        depths=(2, 2, 2, 2),
        num_heads=(3, 6, 12, 24),
        drop_path=0.2,
        coarse_width=24,
        coarse_depths=(2, 2, 2, 2),
        decoder_width=32,
        decoder_head_width=16,
        groups=8,
    ),
}
TINY: Mapping[str, Preset] = {  # for tests: they run in milliseconds
    "transunet-tiny": transunet_tiny,
    "unet-tiny": sized(unet, "unet-tiny", width=4),
    "unet-t-tiny": sized(unet_t, "unet-t-tiny", width=4),
    "swin-unet-tiny": sized(swin_unet, "swin-unet-tiny", width=8, num_heads=(1, 2, 4, 8)),
    "ds-transunet-tiny": sized(
        ds_transunet_b,
        "ds-transunet-tiny",
        width=8,
        depths=(2, 2, 2, 2),
        num_heads=(1, 2, 4, 8),
        drop_path=0.1,
        coarse_width=8,
        coarse_depths=(2, 2, 2, 2),
        coarse_num_heads=(1, 2, 4, 8),
        decoder_width=16,
        decoder_head_width=8,
        groups=4,
    ),
}


def _with_counterparts(presets: Mapping[str, Preset], block: BlockSpec) -> dict[str, Preset]:
    return {**presets, **{f"llm-{name}": with_block(preset, block) for name, preset in presets.items()}}


MODELS: Mapping[str, Preset] = {
    **_with_counterparts(PUBLISHED, LLAMA_7B),
    **_with_counterparts(SMALL, SMOLLM2_135M),
    **_with_counterparts(TINY, TINY_LLAMA),
}
