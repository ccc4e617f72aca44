"""The value of a figure that was not measured."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Missing:
    """A missing figure, with the reason."""

    reason: str

    __pydantic_config__ = {"extra": "forbid"}
