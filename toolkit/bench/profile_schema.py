"""Dataclasses of ``report.json`` for layers, machine peaks and rooflines."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTime:
    """The time of one step of the network, from the back-end's profiler."""

    name: str
    kind: str  # the operator
    kernel: str  # the back-end's implementation, if it reports one
    part: str  # of the network: resnet, vit, block, decoder; "other" if unknown
    runs: int
    ms: float  # of one inference
    share: float  # of all steps, 0 … 1
    macs: int | None  # multiply-accumulates; None: no matrix product, or unknown
    bytes: int | None  # of weights and values read and written, each once

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class PartTime:
    """The time of a part of the network."""

    part: str
    ms: float
    share: float
    macs: int
    steps: int

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """The profile of a row, measured in a separate run, because profiling costs time."""

    tool: str
    runs: int
    total_ms: float
    parts: tuple[PartTime, ...]  # the largest first
    layers: tuple[LayerTime, ...]  # the largest first

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Peak:
    """The peaks of a device of this machine in the same run: a large matrix product, and a copy."""

    arithmetic: str  # fp32, fp16, bf16 or int8
    gmacs_per_s: float  # 10^9 multiply-accumulates a second
    gemm: str  # the product and the back-end
    gbytes_per_s: float  # 10^9 bytes a second, read and written
    copy: str
    device: str = "CPU"  # as sessions name it

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Roofline:
    """A row compared with the machine's roofline."""

    arithmetic: str  # of Peak
    macs: int  # of one image
    bytes: int  # of one image: weights and values, each read and written once
    intensity: float  # MACs a byte
    reached_gmacs_per_s: float
    roof_gmacs_per_s: float  # at this intensity
    share: float  # reached by roof

    __pydantic_config__ = {"extra": "forbid"}
