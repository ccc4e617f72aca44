"""Switch off the telemetry of the libraries that medseg-trt uses, before any of them is imported.

Importing ``medseg_trt`` is enough: every process of ours, children included, does it first.

- ONNX Runtime from 1.30 writes a device id and an event database into the user's cache and looks up Microsoft's
  collector, unless ``ORT_DISABLE_TELEMETRY`` is set when the library is loaded.
- ``import openvino`` sends an event to Google Analytics and writes a client id into the home folder. It has no variable
  for it, but goes without where its package ``openvino_telemetry`` is missing. A module that is None in ``sys.modules``
  counts as missing.
- Hugging Face's libraries, and with them Optimum, obey ``HF_HUB_DISABLE_TELEMETRY`` and ``DO_NOT_TRACK``.
"""

import os
import sys
from collections.abc import Mapping

VARIABLES: Mapping[str, str] = {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
MODULES = ("openvino_telemetry",)  # that only send telemetry


def switch_off() -> None:
    """Switch it off in this process and in those that it starts; a module that is imported already stays."""
    os.environ.update(VARIABLES)
    for module in MODULES:
        sys.modules.setdefault(module, None)  # pyright: ignore[reportArgumentType]  # None: cannot be imported
