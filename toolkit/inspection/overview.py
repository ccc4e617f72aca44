"""Sum up a bundle or a checkpoint in a screenful: what the network is, what it takes, and what it was verified for."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from medseg_trt.bundles.bundle import Bundle, is_signed
from medseg_trt.network_spec import NetworkSpec
from medseg_trt.spec import Preprocessing
from medseg_trt.tiling.windows import recorded_tiles

if TYPE_CHECKING:
    from medseg_trt.inspection.describe import CheckpointDescription

BYTES_PER_WEIGHT = 4  # in float32
MAX_CLASSES = 12  # that are named


def bundle_lines(bundle: Bundle) -> list[str]:
    """Return what a bundle is, a fact a line, without the table of what can be run."""
    content = bundle.content
    source = content.source
    signed = "yes; to check it: --verify-key verify.pem" if is_signed(bundle) else "no"
    return [
        *_network_lines(content.model, bundle.preprocessing, content.classes.names, content.build.outputs),
        *_weight_lines(bundle),
        f"built from: {source.get('checkpoint', 'unknown')}{_digest(source.get('sha256'))}",
        *_origin_lines(source.get("provenance")),
        *([f"guard: {content.guard.text()}"] if content.guard is not None else []),
        f"versions: {_versions(content.versions)}",
        f"manifest: schema {content.schema}, {len(content.files)} files{_digest(bundle.manifest_sha256)}",
        f"signed: {signed}",
    ]


def checkpoint_lines(description: "CheckpointDescription") -> list[str]:
    """Return what a checkpoint is, a fact a line."""
    checkpoint, cost = description.checkpoint, description.cost
    counts = cost.parameters
    frozen = f", {counts['frozen']:,} of them frozen" if counts["frozen"] else ""
    block_file = f"{checkpoint.block_file}{_digest(checkpoint.block_sha256)}"
    return [
        *_network_lines(checkpoint.spec, checkpoint.preprocessing, checkpoint.classes.names, "logits"),
        f"parameters: {counts['total']:,}{frozen}",
        f"work: {cost.macs / 1e9:.2f} billion multiply-accumulates for one image",
        *([f"block file: {block_file}"] if checkpoint.block_file is not None else []),
        *_origin_lines(checkpoint.provenance.to_dict()),
        f"versions: {_versions(checkpoint.provenance.versions or {})}",
        f"file:{_digest(description.sha256).removeprefix(',')}",
    ]


def _network_lines(
    model: NetworkSpec, preprocessing: Preprocessing, names: tuple[str, ...], outputs: str
) -> Iterator[str]:
    height, width = model.image_size
    low, high = preprocessing.window
    more = f", … ({len(names)} in all)" if len(names) > MAX_CLASSES else ""
    spacing = preprocessing.spacing_mm
    yield f"network: {model.architecture}"
    yield f"classes: {', '.join(names[:MAX_CLASSES])}{more}"
    yield f"image size: {height} x {width} pixels"
    yield f"window: {'the range of each image' if preprocessing.own_window else f'{low:g} … {high:g}'}"
    tiles = recorded_tiles(preprocessing)
    stretched = "any; images are stretched to the size" if tiles is None else "any"
    yield f"pixel spacing: {f'{spacing:g} mm' if spacing is not None else stretched}"
    yield f"input: {'whole slices' if tiles is None else tiles}"
    yield f"output: {outputs}"
    if model.block is not None:
        block, insert = model.block, model.insert
        state = "trained" if insert.trainable else "frozen"
        yield (
            f"language block: {insert.num_layers} {state} LLaMA layer{'s' * (insert.num_layers > 1)}, width "
            f"{block.hidden_size}, {block.num_heads} heads; weights {insert.weights}, placement {insert.placement}, "
            f"residual {insert.residual}"
        )


def _weight_lines(bundle: Bundle) -> Iterator[str]:
    """Count the weights of the float32 graphs; folding merges some of the checkpoint's."""
    content = bundle.content
    files = {variant.weights for variant in content.variants.values() if variant.precision == "fp32"}
    if files:
        largest = max(content.files[name].bytes for name in files)
        yield f"parameters: about {largest / BYTES_PER_WEIGHT / 1e6:.1f} million after folding"


def _origin_lines(provenance: object) -> Iterator[str]:
    """Say what the network was trained on, and how well it did there."""
    fields = provenance if isinstance(provenance, Mapping) else {}
    data, metrics, epoch = (fields.get(name) for name in ("data", "metrics", "epoch"))
    if isinstance(data, Mapping) and data.get("name"):
        yield f"trained on: {data['name']}" + (f", epoch {epoch}" if epoch is not None else "")
    for split, scores in (metrics if isinstance(metrics, Mapping) else {}).items():
        numbers = [score for score in scores.values() if isinstance(score, float)] if scores else []
        if numbers:
            yield f"Dice on {split}: {sum(numbers) / len(numbers):.4f}, the mean of {len(numbers)} classes"


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items()) or "not recorded"


def _digest(sha256: object) -> str:
    return f", SHA-256 {sha256}" if sha256 else ""
