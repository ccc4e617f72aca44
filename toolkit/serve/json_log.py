"""Logs as one JSON object a line, without names or values of patients."""

import asyncio
import json
import logging
import threading
import time
from typing import Any

from medseg_trt.progress import printable

FIELDS = (
    "request",
    "method",
    "route",
    "status",
    "ms",
    "bytes",
    "job",
    "kind",
    "model",
    "seconds",
    "destination",
    "count",
)
SILENCED = ("pydicom", "highdicom", "pynetdicom", "py.warnings")  # they quote values of the data sets that they read


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON; of its fields only those of ``FIELDS``."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "message": printable(record.getMessage()),
        }
        line |= {name: record.__dict__[name] for name in FIELDS if name in record.__dict__}
        if record.exc_info and record.exc_info[0] is not None:  # the message of an unknown error may quote a value
            line["error"] = record.exc_info[0].__name__
            trace, frames = record.exc_info[2], []
            while trace is not None:
                frames.append(f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}")
                trace = trace.tb_next
            line["frames"] = frames[-5:]
        return json.dumps(line)


def is_no_cancellation(record: logging.LogRecord) -> bool:
    """Leave out what uvicorn logs of a request that the end of the server cancels; the request itself is in the log."""
    kind = record.exc_info[0] if record.exc_info else None
    return kind is None or not issubclass(kind, asyncio.CancelledError)


def log_as_json(logger: logging.Logger) -> None:
    """Let a logger, uvicorn's, and threads that end with an error write JSON to stderr; silence who quotes data."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    level = logger.level
    for name in (logger.name, "uvicorn.error"):
        chosen = logging.getLogger(name)
        chosen.handlers, chosen.propagate = [handler], False
    handler.addFilter(is_no_cancellation)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    logger.setLevel(level)
    logging.captureWarnings(True)

    def log_end_of_thread(ended: threading.ExceptHookArgs) -> None:
        is_of_peer = ended.exc_type.__module__.startswith("pynetdicom.")
        text = "an association was ended: the peer broke the DICOM protocol" if is_of_peer else "a thread has ended"
        error = ended.exc_value or ended.exc_type()
        logger.log(logging.WARNING if is_of_peer else logging.ERROR, text, exc_info=error)

    threading.excepthook = log_end_of_thread
    for name in SILENCED:
        silenced = logging.getLogger(name)
        silenced.handlers, silenced.propagate = [logging.NullHandler()], False
