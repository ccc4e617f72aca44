"""Which layers of a language model are wanted, and which tensors of its files these are.

A match is strict: every tensor of a layer is used or named as skipped, and a tensor that LLaMA's layer does not have is
an error, because then the layer is not LLaMA's.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medseg_trt.errors import ArtefactError

LayerNumber = int | Literal["last"]
FINAL_NORM = "norm.weight"  # of the language model, in a layer that carries it
SKIPPED_IN_LAYER = (  # they follow from rope_theta; older checkpoints store them
    "self_attn.rotary_emb.inv_freq",
    "attention.inner_attention.rope.freqs",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerChoice:
    """Which layers to take; ``count`` layers end with ``layer``."""

    layer: LayerNumber = "last"  # from 0
    count: int = 1
    final_norm: bool = False  # also the language model's own norm after its last layer

    def __str__(self) -> str:
        layers = f"layer {self.layer}" if self.count == 1 else f"the last {self.count} layers"
        return layers + (" and the final norm" if self.final_norm else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How one kind of file names its tensors."""

    pattern: re.Pattern[str]  # what a layer's names begin with; group 1 is its number
    names: Mapping[str, str]  # the rest of the name -> Hugging Face's
    final_norm: tuple[str, ...]  # its whole name, or names


@dataclass(frozen=True, kw_only=True, slots=True)
class Match:
    """Where the wanted tensors are."""

    num_layers: int
    layers: Mapping[int, Mapping[str, str]]  # the number of a layer -> Hugging Face's name -> the file's key
    skipped: Mapping[str, int]  # how many keys were left out, by group

    @property
    def keys(self) -> list[str]:
        """All keys of the file that are wanted."""
        return [key for keys in self.layers.values() for key in keys.values()]


def match(
    choice: LayerChoice,
    num_layers: Any,
    keys: Iterable[str],
    layout: Layout,
    source: Path,
    elsewhere: Mapping[str, str] | None = None,
) -> Match:
    """Find the tensors of the wanted layers, oldest first; the final norm goes with the last of them.

    Args:
        choice: what is wanted.
        num_layers: how many layers the file says it has.
        keys: what is in it.
        layout: how it names them.
        source: what it is, for the message.
        elsewhere: the files of keys that are not in ``source``, for the message.

    Raises:
        ArtefactError: there is no such layer, one is not whole, or it is not LLaMA's.
    """
    numbers = _numbers(choice, num_layers, source)
    found: dict[int, dict[str, str]] = {number: {} for number in numbers}
    norms: list[str] = []
    skipped: Counter[str] = Counter()
    for key in keys:
        begin = layout.pattern.match(key)
        name = key[begin.end() :] if begin else key
        if begin is not None and int(begin[1]) not in found:
            skipped[f"{begin[0].replace(begin[1], 'N')}*, the other layers"] += 1
        elif choice.final_norm and key in layout.final_norm:
            norms.append(key)
        elif begin is None or name in SKIPPED_IN_LAYER:
            skipped[key] += 1
        else:
            _add(found, int(begin[1]), name, key, layout, source)
    for number, tensors in found.items():
        if missing := [name for name, target in layout.names.items() if target not in tensors]:
            places = {
                key[begin.end() :]: file
                for key, file in (elsewhere or {}).items()
                if (begin := layout.pattern.match(key)) and int(begin[1]) == number
            }
            raise ArtefactError(f"{source}: layer {number} lacks {_with_places(missing, places)}")
    layers = {number: {name: found[number][name] for name in layout.names.values()} for number in numbers}
    if choice.final_norm:
        if not norms:
            raise ArtefactError(
                f"{source} lacks the final norm, {_with_places(layout.final_norm[:1], dict(elsewhere or {}))}"
            )
        layers[numbers[-1]][FINAL_NORM] = norms[0]
    return Match(num_layers=num_layers, layers=layers, skipped=dict(sorted(skipped.items())))


def _numbers(choice: LayerChoice, num_layers: Any, source: Path) -> Sequence[int]:
    if not isinstance(num_layers, int) or num_layers < 1:
        raise ArtefactError(f"{source} does not say how many layers it has (it says {num_layers!r})")
    last = num_layers - 1 if choice.layer == "last" else choice.layer
    if not 0 <= last < num_layers:
        raise ArtefactError(
            f"{source} has no layer {choice.layer}; it has {num_layers}: choose 0 to {num_layers - 1}, or last"
        )
    if choice.count > last + 1:
        raise ArtefactError(f"{source} has {num_layers} layers; {choice.count} cannot be taken")
    return range(last - choice.count + 1, last + 1)


def _add(found: Mapping[int, dict[str, str]], number: int, name: str, key: str, layout: Layout, source: Path) -> None:
    if name not in layout.names:
        raise ArtefactError(f"{source}: {key} is no tensor of a LLaMA layer; this is another architecture")
    tensors, target = found[number], layout.names[name]
    if target in tensors:
        raise ArtefactError(f"{source} has one tensor of layer {number} twice: {tensors[target]} and {key}")
    tensors[target] = key


def _with_places(missing: Iterable[str], places: Mapping[str, str]) -> str:
    """Name missing tensors by the file that has them, and what to do."""
    groups: dict[str, list[str]] = {}
    for name in missing:
        groups.setdefault(places.get(name, ""), []).append(name)
    named = "; ".join(", ".join(names) + (f" (in {file})" if file else "") for file, names in groups.items())
    if "" in groups:
        return f"{named}; if the model is split, give the folder or the part that has it"
    return f"{named}; put these files into one folder with config.json and the index, and give the folder"
