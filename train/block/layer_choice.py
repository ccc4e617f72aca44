"""The choice of layers of a language model, and the match with the tensors in its files.

The match is strict: every tensor of a layer is used or reported as skipped. A tensor that a LLaMA layer does not have
is an error, because the layer is of another architecture.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medseg_trt.errors import ArtefactError

LayerNumber = int | Literal["last"]
FINAL_NORM = "norm.weight"  # of the language model, in its last layer
SKIPPED_IN_LAYER = (  # they follow from rope_theta; older checkpoints store them
    "self_attn.rotary_emb.inv_freq",
    "attention.inner_attention.rope.freqs",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerChoice:
    """The layers to read: ``count`` layers, of which ``layer`` is the last."""

    layer: LayerNumber = "last"  # from 0
    count: int = 1
    final_norm: bool = False  # also the language model's norm after its last layer

    def __str__(self) -> str:
        layers = f"layer {self.layer}" if self.count == 1 else f"the last {self.count} layers"
        return layers + (" and the final norm" if self.final_norm else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The names of the tensors in one kind of file."""

    pattern: re.Pattern[str]  # prefix of a layer's names; group 1 is its number
    names: Mapping[str, str]  # name without the prefix -> Hugging Face's name
    final_norm: tuple[str, ...]  # possible full names


@dataclass(frozen=True, kw_only=True, slots=True)
class Match:
    """The keys of the chosen tensors."""

    num_layers: int
    layers: Mapping[int, Mapping[str, str]]  # layer -> Hugging Face's name -> key in the file
    skipped: Mapping[str, int]  # number of skipped keys, by group

    @property
    def keys(self) -> list[str]:
        """The keys of all chosen tensors."""
        return [key for keys in self.layers.values() for key in keys.values()]


def match(
    choice: LayerChoice,
    num_layers: Any,
    keys: Iterable[str],
    layout: Layout,
    source: Path,
    elsewhere: Mapping[str, str] | None = None,
) -> Match:
    """Find the tensors of the chosen layers; the final norm belongs to the last one.

    Args:
        choice: the layers.
        num_layers: number of layers according to the file.
        keys: in the file.
        layout: of the file.
        source: of the keys, for messages.
        elsewhere: the files of keys that are not in ``source``, for messages.

    Raises:
        ArtefactError: a layer is missing, incomplete, or of another architecture.
    """
    numbers = _numbers(choice, num_layers, source)
    keys_of_layer: dict[int, dict[str, str]] = {number: {} for number in numbers}
    norms: list[str] = []
    skipped: Counter[str] = Counter()
    for key in keys:
        begin = layout.pattern.match(key)
        name = key[begin.end() :] if begin else key
        if begin is not None and int(begin[1]) not in keys_of_layer:
            skipped[f"{begin[0].replace(begin[1], 'N')}*, the other layers"] += 1
        elif choice.final_norm and key in layout.final_norm:
            norms.append(key)
        elif begin is None or name in SKIPPED_IN_LAYER:
            skipped[key] += 1
        else:
            _add(keys_of_layer, int(begin[1]), name, key, layout, source)
    for number, tensors in keys_of_layer.items():
        if missing := [name for name, target in layout.names.items() if target not in tensors]:
            file_of_name = {
                key[begin.end() :]: file
                for key, file in (elsewhere or {}).items()
                if (begin := layout.pattern.match(key)) and int(begin[1]) == number
            }
            raise ArtefactError(f"{source}: layer {number} lacks {_name_by_file(missing, file_of_name)}")
    layers = {number: {name: keys_of_layer[number][name] for name in layout.names.values()} for number in numbers}
    if choice.final_norm:
        if not norms:
            raise ArtefactError(
                f"{source} lacks the final norm, {_name_by_file(layout.final_norm[:1], dict(elsewhere or {}))}"
            )
        layers[numbers[-1]][FINAL_NORM] = norms[0]
    return Match(num_layers=num_layers, layers=layers, skipped=dict(sorted(skipped.items())))


def _numbers(choice: LayerChoice, num_layers: Any, source: Path) -> Sequence[int]:
    if not isinstance(num_layers, int) or num_layers < 1:
        raise ArtefactError(f"{source} does not state its number of layers (it has {num_layers!r})")
    last = num_layers - 1 if choice.layer == "last" else choice.layer
    if not 0 <= last < num_layers:
        raise ArtefactError(
            f"{source} has no layer {choice.layer}; it has {num_layers}: choose 0 to {num_layers - 1}, or last"
        )
    if choice.count > last + 1:
        raise ArtefactError(f"{source} has {num_layers} layers; {choice.count} cannot be read")
    return range(last - choice.count + 1, last + 1)


def _add(
    keys_of_layer: Mapping[int, dict[str, str]], number: int, name: str, key: str, layout: Layout, source: Path
) -> None:
    if name not in layout.names:
        raise ArtefactError(f"{source}: {key} is no tensor of a LLaMA layer; this is another architecture")
    tensors, target = keys_of_layer[number], layout.names[name]
    if target in tensors:
        raise ArtefactError(f"{source} has one tensor of layer {number} twice: {tensors[target]} and {key}")
    tensors[target] = key


def _name_by_file(missing: Iterable[str], file_of_name: Mapping[str, str]) -> str:
    """List missing tensors by the file that contains them, with the remedy."""
    groups: dict[str, list[str]] = {}
    for name in missing:
        groups.setdefault(file_of_name.get(name, ""), []).append(name)
    named = "; ".join(", ".join(names) + (f" (in {file})" if file else "") for file, names in groups.items())
    if "" in groups:
        return f"{named}; if the model is split, give the folder or the part that has it"
    return f"{named}; put these files into one folder with config.json and the index, and give the folder"
