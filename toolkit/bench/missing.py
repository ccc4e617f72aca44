"""The value of a figure that was not measured: the reason in words."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Missing:
    """A figure that does not exist, and why."""

    reason: str

    __pydantic_config__ = {"extra": "forbid"}
