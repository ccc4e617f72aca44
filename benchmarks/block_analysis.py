"""What does the frozen block do in a trained network, and which rung of the ladder may stand in for it?

Analyses the demo's network, the same network with random and with shuffled weights in the block, and a stress network:
the demo's, fine-tuned with the mean token of every image subtracted before the block, so that its tokens have no common
direction. Every rung is fitted to training slices and judged by its held-out error and by the Dice of its network in
PyTorch on both scans. One fit and one seed each.

    python benchmarks/block_analysis.py run/best.pt --data data/organs
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import chain, count, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from results_file import options, publish, table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from medseg_trt.building.block_images import block_images
from medseg_trt.building.block_ladder import BlockLadder
from medseg_trt.building.contract import Contract
from medseg_trt.building.reference import Reference
from medseg_trt.building.reference_images import reference_images, second_judged_images
from medseg_trt.export.compress.analysis import BlockAnalysis, analyse_block
from medseg_trt.export.compress.held_out import HeldOutError
from medseg_trt.export.compress.tokens import BlockTokens, tokens_before_block
from medseg_trt.export.fold.fold import fold
from medseg_trt.export.gate import GateVerdict
from medseg_trt.spec import BuildSpec, from_dict
from medseg_trt.train.checkpoint import Checkpoint, load_checkpoint
from medseg_trt.train.datasets.prepared import prepare_slices
from medseg_trt.train.epoch_slices import EpochSlices
from medseg_trt.train.losses import segmentation_loss
from medseg_trt.train.models.model import LanguageInsert, build_model, runner
from medseg_trt.train.models.segmentation_model import SegmentationModel
from medseg_trt.train.models.transunet import TransUNet
from medseg_trt.train.recipes.training_spec import Recipe
from medseg_trt.train.recorded_data import open_recorded

STEPS, BATCH, LEARNING_RATE = 90, 8, 3e-4  # of the stress network
FIRST_EPOCH = 1000  # of its augmentation: none that the checkpoint was trained with
SEED = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class RungResult:
    """One rung in one network."""

    rung: str
    macs: int
    error: HeldOutError | None
    val: GateVerdict
    test: GateVerdict | None


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkResult:
    """One network."""

    name: str
    analysis: BlockAnalysis
    rungs: tuple[RungResult, ...]


class SubtractMean(nn.Module):
    """Subtracts the mean token of every image."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Return tokens without a common direction."""
        return tokens - tokens.mean(1, keepdim=True)


def stress_network(checkpoint: Checkpoint, data: Path) -> SegmentationModel:
    """Return the checkpoint's network with the mean token subtracted before the block, fine-tuned."""
    network, recorded = checkpoint.model(), checkpoint.provenance.recipe
    assert isinstance(network, TransUNet)
    assert recorded is not None  # ``train`` records it
    network.layers[-1] = nn.Sequential(network.layers[-1], SubtractMean())
    recipe = from_dict(Recipe, recorded, "the checkpoint's recipe")
    folder = open_recorded(data, checkpoint.provenance)
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, LEARNING_RATE, weight_decay=recipe.train.weight_decay)
    network.train()
    with TemporaryDirectory() as temporary:
        names = len(checkpoint.classes.names)
        slices = prepare_slices(folder.cases("train"), checkpoint.preprocessing, names, Path(temporary))
        epochs = (DataLoader(EpochSlices(slices, recipe, epoch), BATCH) for epoch in count(FIRST_EPOCH))
        for images, labels in islice(chain.from_iterable(epochs), STEPS):
            optimizer.zero_grad()
            segmentation_loss(network(images), labels).backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
    return network.eval()


def with_weights(checkpoint: Checkpoint, kind: str) -> SegmentationModel:
    """Return the checkpoint's network with random or shuffled weights in the place of the language model's."""
    insert = replace(checkpoint.spec.insert, weights=kind)  # pyright: ignore[reportArgumentType]
    other = build_model(replace(checkpoint.spec, insert=insert), checkpoint.block())
    trained = {name: weight for name, weight in checkpoint.model().state_dict().items() if "insert.block" not in name}
    other.load_state_dict(trained, strict=False)
    return other.eval()


def networks(checkpoint: Checkpoint, data: Path) -> Iterator[tuple[str, SegmentationModel]]:
    """Yield the networks with their names."""
    yield "demo", checkpoint.model()
    yield f"stress: no common direction, {STEPS} steps of fine-tuning", stress_network(checkpoint, data)
    yield "demo, random block, not trained with it", with_weights(checkpoint, "random")
    yield "demo, shuffled block, not trained with it", with_weights(checkpoint, "shuffled")


def judge(name: str, checkpoint: Checkpoint, network: SegmentationModel, data: Path) -> NetworkResult:
    """Analyse one network, and judge every rung in it."""
    images, second = reference_images(checkpoint, data), second_judged_images(checkpoint, data)
    spec = BuildSpec(block="auto")
    reference = Reference(network=runner(network), contract=Contract.of(checkpoint), images=images, spec=spec)
    of_second = reference.with_judged(second) if second is not None else None
    judged = (images.judged, *((second,) if second is not None else ()))
    ladder = BlockLadder(checkpoint, network, fold(network)[0], spec, data, judged)
    rungs = tuple(
        RungResult(
            rung=str(candidate.rung),
            macs=candidate.cost.macs if candidate.cost is not None else 0,
            error=candidate.error,
            val=reference.verdict(runner(candidate.network))[0],
            test=of_second.verdict(runner(candidate.network))[0] if of_second is not None else None,
        )
        for candidate in ladder.candidates()
    )
    calibration = block_images(checkpoint, data, [split.inputs for split in judged])
    tokens = BlockTokens(
        fitted=tokens_before_block(network, calibration.fitted),
        held_out=tokens_before_block(network, calibration.held_out),
    )
    assert isinstance(network.insert, LanguageInsert)
    return NetworkResult(name=name, analysis=analyse_block(network.insert, tokens), rungs=rungs)


def to_markdown(result: Mapping[str, Any]) -> str:
    """Return the page."""
    networks_header = ["network", "common energy", "uniformity", "effective rank", "relative error", "unexplained"]
    rows = [
        [
            network["name"],
            f"{network['analysis']['common_energy']:.4f}",
            f"{network['analysis']['attention_uniformity']:.4f}",
            f"{network['analysis']['effective_rank']:.1f} of {network['analysis']['language_width']}",
            f"{network['analysis']['affine']['relative']:.4f}",
            f"{network['analysis']['affine']['unexplained']:.4f}",
        ]
        for network in result["networks"]
    ]
    about = (__doc__ or "").partition("\n\n")[2].partition("\n\n    ")[0]
    parts = ["# The block as an affine map", about, "\n".join(table(networks_header, rows))]
    header = ["rung", "MACs", "relative error", "unexplained", "Dice val", "drop val <", "Dice test", "drop test <"]
    for network in result["networks"]:
        parts += [f"## {network['name']}", "\n".join(table(header, [_rung_row(rung) for rung in network["rungs"]]))]
    return "\n\n".join(parts) + "\n"


def _rung_row(rung: Mapping[str, Any]) -> list[str]:
    error, test = rung["error"], rung["test"]
    return [
        rung["rung"],
        f"{rung['macs']:,}",
        f"{error['relative']:.4f}" if error else "–",
        f"{error['unexplained']:.4f}" if error else "–",
        f"{rung['val']['candidate']:.4f}",
        f"{rung['val']['high']:+.4f}",
        f"{test['candidate']:.4f}" if test else "–",
        f"{test['high']:+.4f}" if test else "–",
    ]


def main() -> None:
    """Analyse and publish."""
    parser = options(__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", type=int, metavar="COUNT", help="the first networks only")
    chosen = parser.parse_args()
    torch.manual_seed(SEED)
    checkpoint = load_checkpoint(chosen.checkpoint)
    results = list[NetworkResult]()
    for name, network in networks(checkpoint, chosen.data):
        results.append(judge(name, checkpoint, network, chosen.data))
        print(results[-1], file=sys.stderr, flush=True)
        if chosen.only == len(results):
            break
    publish("block_analysis", {"networks": [asdict(network) for network in results]}, to_markdown, chosen)


if __name__ == "__main__":
    main()
