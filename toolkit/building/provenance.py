"""Where a bundle comes from: its checkpoint, and the training that the checkpoint records."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg_trt.files import sha256

if TYPE_CHECKING:
    from medseg_trt.train.checkpoint import Checkpoint

PRIVATE_FIELDS = ("root", "manifest")  # the path and the file names of the training images


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """The field ``source`` of a bundle's manifest."""

    checkpoint: str  # file name, without its folder
    sha256: str
    block_sha256: str | None  # of the frozen block; None: the network has none
    provenance: Mapping[str, Any]  # as in the checkpoint, without private paths and names

    @classmethod
    def of(cls, checkpoint: "Checkpoint", path: Path) -> "Provenance":
        """Describe a checkpoint that was read from ``path``, without paths and names of the training images."""
        provenance = checkpoint.provenance.to_dict()
        if provenance.get("data"):
            fields = provenance["data"].items()
            provenance["data"] = {name: value for name, value in fields if name not in PRIVATE_FIELDS}
        options = provenance.get("recipe", {}).get("data")
        if options and options["manifest"]:
            public_options = {**options, "manifest": Path(options["manifest"]).name}
            provenance["recipe"] = {**provenance["recipe"], "data": public_options}
        return cls(
            checkpoint=path.name,
            sha256=sha256(path),
            block_sha256=checkpoint.block_sha256,
            provenance=provenance,
        )
