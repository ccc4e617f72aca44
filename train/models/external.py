"""Networks of other packages, and of one's own code, by name.

- "monai:SwinUNETR": a class of ``monai.networks.nets``, with two spatial axes
- "smp:Unet/resnet34": a class of segmentation-models-pytorch and its encoder
- "timm:Unet/resnet18d": the same with an encoder of timm, which SMP wraps
- "module:function": ``function(num_classes=…, image_size=…)`` of one's own module returns a network from images
  (batch, 3, height, width) to logits (batch, classes, height, width); see ``own_code``

Arguments follow in brackets: "monai:UNet(channels=[16,32,64],strides=[2,2])". Weights are never fetched: every network
starts from random ones.
"""

import ast
import difflib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from medseg_trt.errors import MedsegError, UsageError, require
from medseg_trt.external_spec import ExternalSpec
from medseg_trt.train.models.network_budget import SMALLER, BoundedActivations, bounded_construction
from medseg_trt.train.models.own_code import own_function, remember_own
from medseg_trt.train.models.segmentation_model import SegmentationModel, three_channels

NAME = re.compile(r"(?P<source>[A-Za-z_][\w.]*):(?P<name>[A-Za-z_][\w.\-]*(?:/[\w.\-]+)?)(?:\((?P<options>.*)\))?")
FETCHES = re.compile("pretrain|weights|checkpoint|url")  # in the name of an argument
MAX_NAME = 500  # characters
MAX_NUMBER = 1 << 16  # in an argument: packages compute with sizes before they build anything
MAX_NEAR = 5  # names that an error lists
EXAMPLES = "monai:SwinUNETR, smp:Unet/resnet34, timm:Unet/resnet18d or mymodule:myfunction"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExternalName:
    """A name of a network from elsewhere, in its parts."""

    source: str  # "monai", "smp", "timm", or a module
    name: str
    options: Mapping[str, Any]  # plain values


class ExternalNetwork(SegmentationModel):
    """A network that this package did not make."""

    spec: ExternalSpec

    def __init__(self, spec: ExternalSpec, insert: nn.Module | None = None) -> None:
        super().__init__(spec)
        assert insert is None  # the spec has refused a block
        self.insert = None
        if torch.get_default_device().type != "meta":  # a first one without memory shows whether there is enough
            with torch.device("meta"):
                _construct(spec)
        self.network = _construct(spec)

    def forward(self, image: Float[Tensor, "batch channels height width"]) -> Tensor:
        """Return the logits, (batch, classes, height, width)."""
        return self.network(three_channels(image))


def parse_external(architecture: str) -> ExternalName:
    """Return the parts of a name.

    Raises:
        ValueError: it is no such name, or an argument is no plain value, too large, or would fetch weights.
    """
    if architecture.startswith("llm-"):
        raise ValueError(f"{architecture} has no token map that this version knows, so it can have no language block")
    match = NAME.fullmatch(architecture) if len(architecture) <= MAX_NAME else None
    if match is None:
        raise ValueError(f"{architecture[:MAX_NAME]!r} names no network; write it as {EXAMPLES}")
    options: dict[str, Any] = {}
    try:
        call = ast.parse(f"f({match['options'] or ''})", mode="eval").body
        assert isinstance(call, ast.Call)
        assert not call.args
        assert isinstance(call.func, ast.Name)  # one pair of brackets
        assert all(keyword.arg is not None for keyword in call.keywords)
        options = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (AssertionError, ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"the arguments of {architecture} must be name=value with plain values, such as feature_size=24"
        ) from error
    if large := [number for number in _numbers(options) if abs(number) > MAX_NUMBER]:
        raise ValueError(f"{architecture}: {large[0]} is more than {MAX_NUMBER}, larger than any network; {SMALLER}")
    if fetched := [name for name in options if FETCHES.search(name)]:
        raise ValueError(f"{architecture}: {fetched[0]} would fetch weights; networks start from random ones")
    return ExternalName(source=match["source"], name=match["name"], options=options)


def _numbers(value: Any) -> list[int | float]:
    if isinstance(value, dict):
        return _numbers([*value, *value.values()])
    if isinstance(value, tuple | list | set):
        return [number for item in value for number in _numbers(item)]
    return [value] if isinstance(value, int | float) else []


def is_external(architecture: str) -> bool:
    """Say whether a name is that of a network from elsewhere, without looking for it."""
    return ":" in architecture


def allow_own_code(architecture: str) -> None:
    """Allow a function of one's own module, since the user has typed its name; other names need no permission.

    Raises:
        ValueError: it is no name.
        UsageError: there is no such module.
        InputError: the state folder cannot be written to.
    """
    if is_external(architecture):
        name = parse_external(architecture)
        if name.source not in SOURCES:
            remember_own(f"{name.source}:{name.name}")


def external_spec(architecture: str, image_size: tuple[int, int], num_classes: int) -> ExternalSpec:
    """Return the spec of a network from elsewhere, after building it without memory and running it once.

    Raises:
        UsageError: no such network, it refuses its arguments or the image size, it would take too much memory, or it
            gives something else than logits.
        MissingExtraError: its package is not installed.
    """
    spec = ExternalSpec(architecture=architecture, image_size=image_size, num_classes=num_classes)
    rows, columns = image_size
    with torch.device("meta"), torch.no_grad():
        network = ExternalNetwork(spec).eval()
        try:
            with BoundedActivations(architecture):
                logits: object = network.network(torch.zeros(1, 3, rows, columns))
        except MedsegError:
            raise
        except Exception as error:  # whatever the network raises
            reason = " ".join(str(error).split())[:200]
            raise UsageError(f"{architecture} refuses images of {rows} x {columns} pixels: {reason}") from error
    if not isinstance(logits, Tensor):
        kind = type(logits).__name__
        raise UsageError(f"{architecture} gives a {kind}, not one tensor of logits; switch its other heads off")
    if logits.shape != (1, num_classes, rows, columns):
        raise UsageError(
            f"{architecture} gives {tuple(logits.shape[1:])} for an image of {rows} x {columns} pixels, not "
            f"{(num_classes, rows, columns)}"
        )
    return spec


class _LinspaceOnCpu(TorchFunctionMode):
    """Keeps ``torch.linspace`` on the CPU: networks read rates of drop-path from it, which a meta tensor has not."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.linspace:
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def _construct(spec: ExternalSpec) -> nn.Module:
    try:
        name = parse_external(spec.architecture)
    except ValueError as error:
        raise UsageError(str(error)) from error
    make = SOURCES.get(name.source, _own)
    try:
        with _LinspaceOnCpu(), bounded_construction(spec.architecture):
            network = make(spec, name)
    except MedsegError:
        raise
    except Exception as error:  # whatever the constructor raises
        reason = " ".join(str(error).split())[:300]
        raise UsageError(
            f"{spec.architecture} cannot be built ({reason}); give its arguments in brackets: name(size=16, …)"
        ) from error
    if not isinstance(network, nn.Module):
        raise UsageError(f"{spec.architecture} is a {type(network).__name__}, not a network of PyTorch")
    return network


def _monai(spec: ExternalSpec, name: ExternalName) -> nn.Module:
    make = _class_of(require("monai.networks.nets", "monai"), name, "monai.networks.nets")
    taken = inspect.signature(make).parameters
    known = {"in_channels": 3, "out_channels": spec.num_classes, "spatial_dims": 2, "img_size": spec.image_size}
    offline = {key: False for key, parameter in taken.items() if FETCHES.search(key) and parameter.default is True}
    return make(**{key: value for key, value in known.items() if key in taken} | offline | dict(name.options))


def _smp(spec: ExternalSpec, name: ExternalName) -> nn.Module:
    return _with_encoder(spec, name, "")


def _timm(spec: ExternalSpec, name: ExternalName) -> nn.Module:
    return _with_encoder(spec, name, "tu-")  # SMP's prefix of timm's encoders


def _with_encoder(spec: ExternalSpec, name: ExternalName, prefix: str) -> nn.Module:
    decoder, _, encoder = name.name.partition("/")
    if not encoder:
        raise UsageError(f"{spec.architecture} names no encoder; write {name.source}:{decoder}/resnet34")
    package = require("segmentation_models_pytorch", "smp")
    make = _class_of(package, ExternalName(source=name.source, name=decoder, options={}), package.__name__)
    return make(
        encoder_name=f"{prefix}{encoder}",
        encoder_weights=None,
        in_channels=3,
        classes=spec.num_classes,
        **name.options,
    )


def _own(spec: ExternalSpec, name: ExternalName) -> nn.Module:
    function = own_function(f"{name.source}:{name.name}")
    return function(num_classes=spec.num_classes, image_size=spec.image_size, **name.options)


def _class_of(package: Any, name: ExternalName, source: str) -> Callable[..., nn.Module]:
    make = getattr(package, name.name, None)
    if not (isinstance(make, type) and issubclass(make, nn.Module)):
        names = list(dict.fromkeys(value.__name__ for value in vars(package).values() if _is_network(value)))
        near = difflib.get_close_matches(name.name, names, MAX_NEAR, 0.5)
        choices = f"the nearest are: {', '.join(near)}" if near else f"it has: {', '.join(names)}"
        raise UsageError(f"{source} has no network {name.name!r}; {choices}")
    return make


def _is_network(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module) and value.__name__[0].isupper()


SOURCES: Mapping[str, Callable[[ExternalSpec, ExternalName], nn.Module]] = {"monai": _monai, "smp": _smp, "timm": _timm}
