"""What ``report.json`` holds of layers, machine peaks and rooflines."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTime:
    """What one step of the network takes, as the back-end says."""

    name: str
    kind: str  # the operator
    kernel: str  # the back-end's implementation, where it says
    part: str  # of the network: resnet, vit, block, decoder; "other" where that cannot be told
    runs: int
    ms: float  # of one inference
    share: float  # of all steps, 0 … 1
    macs: int | None  # multiply-accumulates; None where the step multiplies no matrices or cannot be told
    bytes: int | None  # of weights and values read and written, each once

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class PartTime:
    """What a part of the network takes."""

    part: str
    ms: float
    share: float
    macs: int
    steps: int

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """Where a row's time goes; taken in a run of its own, since looking costs time."""

    tool: str
    runs: int
    total_ms: float
    parts: tuple[PartTime, ...]  # the largest first
    layers: tuple[LayerTime, ...]  # the largest first

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Peak:
    """What this machine reached in the same run: a large matrix product, and a copy."""

    arithmetic: str  # fp32, bf16 or int8
    gmacs_per_s: float  # 10^9 multiply-accumulates a second
    gemm: str  # what was multiplied, by what
    gbytes_per_s: float  # 10^9 bytes a second, read and written
    copy: str

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Roofline:
    """A row against its machine's roof."""

    arithmetic: str  # of Peak
    macs: int  # of one image
    bytes: int  # of one image: weights and values, each read and written once
    intensity: float  # MACs a byte
    reached_gmacs_per_s: float
    roof_gmacs_per_s: float  # at this intensity
    share: float  # reached by roof

    __pydantic_config__ = {"extra": "forbid"}
