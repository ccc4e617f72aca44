"""Name the rungs of the ladder from the exact LLaMA layer down to one matrix, and choose them for a geometry.

A rung is ``exact``, ``affine`` (one matrix and a bias) or ``narrow:r=512,k=1024,heads=4``: a LLaMA layer with ``r`` of
the language model's dimensions, ``k`` of its neurons and ``heads`` of its query heads. This module loads no PyTorch.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from medseg_trt.errors import UsageError
from medseg_trt.network_spec import ModelSpec, NetworkSpec
from medseg_trt.spec import BlockSpec

Kind = Literal["affine", "narrow", "exact"]
AUTO = "auto"
NARROW = re.compile(r"narrow:r=(\d{1,9}),k=(\d{1,9}),heads=(\d{1,9})")
# Shares of the width, of the neurons and of the head groups; of LLaMA-7B: r=512,k=1024,heads=4 and
# r=768,k=2048,heads=16.
LADDER_SHARES = (
    (Fraction(512, 4096), Fraction(1024, 11008), Fraction(4, 32)),
    (Fraction(768, 4096), Fraction(2048, 11008), Fraction(16, 32)),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rung:
    """One replacement of the block; the sizes are those of a narrow layer and 0 in the other kinds."""

    kind: Kind
    width: int = 0  # r: directions of the language model's space
    neurons: int = 0  # k
    heads: int = 0  # query heads, in whole groups that share a key/value head

    def __str__(self) -> str:
        """Return the rung as ``--block`` takes it."""
        sizes = f":r={self.width},k={self.neurons},heads={self.heads}" if self.kind == "narrow" else ""
        return f"{self.kind}{sizes}"


EXACT, AFFINE = Rung(kind="exact"), Rung(kind="affine")


def parse_block(text: str) -> Rung | None:
    """Return the rung that ``--block`` names; None for ``auto``.

    Raises:
        UsageError: it names none.
    """
    named = {AUTO: None, str(EXACT): EXACT, str(AFFINE): AFFINE}
    if text in named:
        return named[text]
    sizes = NARROW.fullmatch(text.replace(" ", ""))
    if sizes is None:
        raise UsageError(f"--block {text}: choose exact, auto, affine or narrow:r=512,k=1024,heads=4")
    width, neurons, heads = map(int, sizes.groups())
    if not min(width, neurons, heads):
        raise UsageError(f"--block {text}: every size of a narrow layer must be at least 1")
    return Rung(kind="narrow", width=width, neurons=neurons, heads=heads)


def candidate_rungs(requested: Rung | None, model: NetworkSpec) -> tuple[Rung, ...]:
    """Return the rungs to try for a network, the cheapest first; ``auto`` ends with the exact block.

    Args:
        requested: the result of ``parse_block``.
        model: the network.

    Raises:
        UsageError: the network has no block that can be replaced, or a narrow layer exceeds its geometry.
    """
    if requested == EXACT:
        return (EXACT,)
    block = replaceable_block(model)
    if requested is None:
        narrow = ladder(block) if model.insert.parts == "full" else ()
        return (AFFINE, *narrow, EXACT)
    if requested.kind == "narrow":
        _check_narrow(requested, block, model)
    return (requested,)


def ladder(block: BlockSpec) -> tuple[Rung, ...]:
    """Return the narrow rungs of a block: the same shares of its width, neurons and head groups for every geometry."""
    group = block.num_heads // block.num_kv_heads
    return tuple(
        Rung(
            kind="narrow",
            width=max(1, round(width * block.hidden_size)),
            neurons=max(1, round(neurons * block.intermediate_size)),
            heads=group * max(1, round(groups * block.num_kv_heads)),
        )
        for width, neurons, groups in LADDER_SHARES
    )


def replaceable_block(model: NetworkSpec) -> BlockSpec:
    """Return the geometry of a block that a cheaper rung can replace.

    Raises:
        UsageError: there is none; the message says why.
    """
    insert, keep = model.insert, "; build it with --block exact"
    if model.block is None:
        raise UsageError(f"{model.architecture} has no language block to replace{keep}")
    if not isinstance(model, ModelSpec):
        raise UsageError(f"{model.architecture} is no TransUNet, and replacements are judged in TransUNets only{keep}")
    if not insert.has_layers:
        raise UsageError(f"weights={insert.weights}: there is no language layer between the maps to replace{keep}")
    if insert.residual != "none":
        raise UsageError(
            f"residual={insert.residual}: the sum around the block needs the scale of its tokens, which a replacement "
            f"does not keep{keep}"
        )
    if insert.num_layers != 1:
        raise UsageError(f"num_layers={insert.num_layers}: one replacement stands for one language layer{keep}")
    if model.insert_position != model.num_layers:
        raise UsageError(
            f"placement={insert.placement}: a replacement gives tokens up to their scale, which only encoder_norm "
            f"right after the block undoes{keep}"
        )
    return model.block


def _check_narrow(rung: Rung, block: BlockSpec, model: NetworkSpec) -> None:
    if model.insert.parts != "full":
        raise UsageError(
            f"parts={model.insert.parts}: a narrow layer has attention and an MLP; choose --block affine or exact"
        )
    for name, size, largest in (
        ("r", rung.width, block.hidden_size),
        ("k", rung.neurons, block.intermediate_size),
        ("heads", rung.heads, block.num_heads),
    ):
        if size > largest:
            raise UsageError(f"--block {rung}: {name} is {size}, but the block has {largest}")
    group = block.num_heads // block.num_kv_heads
    if rung.heads % group:
        raise UsageError(
            f"--block {rung}: {group} heads of this block share a key/value head; heads must be a multiple of {group}"
        )
