"""The manifest in Hugging Face's terms: ``config.json`` and ``preprocessor_config.json``."""

import json
from collections.abc import Mapping
from typing import Any, cast

from medseg_trt.bundles.manifest import Manifest
from medseg_trt.spec import Preprocessing, to_dict


def model_config(manifest: Manifest) -> dict[str, Any]:
    """Return ``config.json``; a binary network has one logit and two labels."""
    names = manifest.classes.names
    height, width = manifest.model.image_size
    return {
        "model_type": "medseg-trt",
        "architectures": [manifest.model.architecture],
        "image_size": [height, width],
        "num_channels": 3,
        "num_logits": manifest.model.num_classes,
        "id2label": {str(index): name for index, name in enumerate(names)},
        "label2id": {name: index for index, name in enumerate(names)},
    }


def preprocessor_config(preprocessing: Preprocessing) -> dict[str, Any]:
    """Return ``preprocessor_config.json``.

    Hugging Face has no word for both kinds of windows, spacing_mm and channel_order.
    """
    (height, width), windows = preprocessing.image_size, preprocessing.windows
    return {
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resize": preprocessing.resize,
        "do_rescale": True,
        "window": list(preprocessing.window),
        "own_window": preprocessing.own_window,
        "spacing_mm": preprocessing.spacing_mm,
        "windows": None if windows is None else to_dict(windows),
        "channel_order": preprocessing.channel_order,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }


def differing_fields(stored: object, expected: Mapping[str, Any]) -> list[str]:
    """Return the fields of a stored file that say something else than the manifest; older files have fewer fields."""
    fields = cast("dict[str, Any]", stored) if isinstance(stored, dict) else {}
    written = json.loads(json.dumps(expected))
    return [name for name, value in written.items() if name in fields and fields[name] != value]
