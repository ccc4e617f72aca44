"""What ``/metrics`` shows, in the text format of Prometheus."""

from collections.abc import Callable
from typing import Any

from medseg_trt.errors import require
from medseg_trt.serve.settings import EXTRA

LATENCY_BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)


class Metrics:
    """The counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        client = require("prometheus_client", EXTRA)
        self._client: Any = client
        self.registry = client.CollectorRegistry()

        def make(kind: Any, name: str, text: str, labels: tuple[str, ...], **options: Any) -> Any:
            return kind(f"medseg_{name}", text, labels, registry=self.registry, **options)

        self.requests = make(client.Counter, "http_requests", "HTTP requests", ("route", "status"))
        self.latency = make(
            client.Histogram, "http_seconds", "Duration of HTTP requests", ("route",), buckets=LATENCY_BUCKETS_S
        )
        self.batch = make(
            client.Histogram, "batch_slices", "Slices per run of the network", ("model",), buckets=(1, 2, 3, 4, 8, 16)
        )
        self.run = make(
            client.Histogram, "run_seconds", "Duration of a run of the network", ("model",), buckets=LATENCY_BUCKETS_S
        )
        self.queue = make(client.Gauge, "queue_slices", "Slices that wait for the network", ("model",))
        self.open = make(client.Gauge, "open_requests", "Requests that wait or run", ("model",))
        self.jobs = make(client.Gauge, "jobs", "Jobs in the spool", ("state",))
        self.sends = make(client.Gauge, "sends_waiting", "Segmentations that wait for a destination", ("destination",))
        self.failures = make(client.Counter, "failures", "Failures", ("kind",))
        self.stored = make(client.Counter, "dicom_objects", "DICOM objects received", ("status",))

    def record_batch(self, model: str, slices: int, seconds: float) -> None:
        """Count a run of the network."""
        self.batch.labels(model).observe(slices)
        self.run.labels(model).observe(seconds)

    def watch(self, gauge: Any, label: str, read: Callable[[], float]) -> None:
        """Let a gauge read its value when it is asked for."""
        gauge.labels(label).set_function(read)

    def text(self) -> bytes:
        """Return all metrics as text."""
        return self._client.generate_latest(self.registry)
