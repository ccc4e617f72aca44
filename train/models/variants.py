"""The weights that the language layers start from: a language model's own, or a control without their structure.

A control follows from ``InsertSpec.seed``, the place of the layer and the block file alone, so that frozen weights need
not be stored.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from medseg_trt.errors import UsageError
from medseg_trt.spec import BlockSpec, InsertSpec
from medseg_trt.train.block.blocks import FrozenBlock, random_block
from medseg_trt.train.block.layer_choice import FINAL_NORM

Tensors = Mapping[str, Tensor]


def layer_weights(insert: InsertSpec, geometry: BlockSpec, blocks: Sequence[FrozenBlock]) -> list[Tensors]:
    """Return the weights of every language layer, in order, under Hugging Face's names.

    Args:
        insert: which weights.
        geometry: of one layer.
        blocks: the language model's layers, in order; unused for random weights.

    Raises:
        UsageError: there are more or fewer blocks than layers.
    """
    if not insert.has_layers:
        return []
    if insert.weights == "random":
        return [random_block(geometry, _seed(insert.seed, number)).tensors for number in range(insert.num_layers)]
    if len(blocks) != insert.num_layers:
        raise UsageError(
            f"insert.num_layers is {insert.num_layers}, but the block holds {len(blocks)} layer(s); they must agree: "
            f"medseg-trt block extract SOURCE --layers {insert.num_layers}"
        )
    return [CHANGES[insert.weights](block.tensors, insert.seed, number) for number, block in enumerate(blocks)]


def unchanged(tensors: Tensors, seed: int, number: int) -> Tensors:
    """Return a language model's own weights."""
    return tensors


def shuffled(tensors: Tensors, seed: int, number: int) -> Tensors:
    """Permute the values of every tensor, each on its own, whatever the others are and in which order they come."""
    return {
        name: _permuted(tensor, np.random.default_rng([seed, number, *name.encode()]))
        for name, tensor in tensors.items()
    }


CHANGES: Mapping[str, Callable[[Tensors, int, int], Tensors]] = {"pretrained": unchanged, "shuffled": shuffled}


def final_norm(blocks: Sequence[FrozenBlock]) -> Tensor:
    """Return the weight of the language model's own final norm.

    Raises:
        UsageError: the block does not carry it.
    """
    if not blocks or FINAL_NORM not in blocks[-1].tensors:
        raise UsageError(
            f"insert.norm=pretrained needs the language model's final norm, and the block has no {FINAL_NORM}. "
            "Extract the block again: medseg-trt block extract SOURCE --final-norm, or choose insert.norm=ones"
        )
    return blocks[-1].tensors[FINAL_NORM]


def _permuted(tensor: Tensor, random: np.random.Generator) -> Tensor:
    values = random.permutation(tensor.float().flatten().numpy())  # NumPy has no bfloat16; float32 holds it exactly
    return torch.from_numpy(values).reshape(tensor.shape).to(tensor.dtype)


def _seed(seed: int, number: int) -> int:
    """Return a seed for one layer; ``seed + number`` would give layer 1 of seed 0 the weights of layer 0 of seed 1."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0])
