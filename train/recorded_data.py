"""Open a data set as a model's training did."""

from dataclasses import replace
from pathlib import Path

from medseg_trt.errors import InputError
from medseg_trt.spec import from_dict
from medseg_trt.train.datasets.folder import DataFolder
from medseg_trt.train.datasets.official import open_dataset
from medseg_trt.train.datasets.options import DataOptions
from medseg_trt.train.datasets.split_manifest import SplitManifest, with_recorded_splits
from medseg_trt.train.provenance import Provenance


def open_recorded(root: Path, provenance: Provenance, options: DataOptions | None = None) -> DataFolder:
    """Open a data set as a model's training did: with its options, and with its splits where a manifest defined them.

    Args:
        root: the data set's folder.
        provenance: of the model.
        options: to use instead of the recorded ones.

    Raises:
        InputError: the folder cannot be read with these options.
        UsageError: an option does not apply to the data set.
    """
    if options is None:
        options = recorded_options(provenance)
        manifest = provenance.data.manifest if provenance.data is not None else None
        if options.manifest is not None and manifest is None:  # a bundle, which does not name the cases
            raise InputError(
                f"the model was trained with the splits of {Path(options.manifest).name}, which is not in it; "
                "give the file again: --set data.manifest=FILE"
            )
        if options.manifest is not None:
            data = open_dataset(None, root, replace(options, manifest=None, order="natural"))
            return with_recorded_splits(data, from_dict(SplitManifest, manifest, "the model"), "the model")
    return open_dataset(None, root, options)


def recorded_options(provenance: Provenance) -> DataOptions:
    """Return the data options of a model's training; the defaults if none are recorded."""
    recorded = provenance.recipe.get("data") if provenance.recipe is not None else None
    return DataOptions() if recorded is None else from_dict(DataOptions, recorded, "the model's recipe")
