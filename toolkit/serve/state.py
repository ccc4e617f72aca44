"""What the routes of one server share."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from medseg_trt.serve.jobs import JobRunner
from medseg_trt.serve.metrics import Metrics
from medseg_trt.serve.model import ServedModel
from medseg_trt.serve.series import OpenTransfers
from medseg_trt.serve.settings import ServeSettings
from medseg_trt.serve.spool import Spool


@dataclass(kw_only=True, slots=True, eq=False)
class ServerState:
    """The open models, the spool, and the threads that decode and encode."""

    settings: ServeSettings
    models: Mapping[str, ServedModel]
    spool: Spool
    jobs: JobRunner
    metrics: Metrics
    threads: ThreadPoolExecutor
    uploads: Path  # a folder for the files of requests that are answered at once; emptied at the start
    storing: OpenTransfers = field(default_factory=OpenTransfers)  # requests that store DICOM objects
    is_ready: bool = True
    drain_started: float | None = None  # time.monotonic of the first signal
