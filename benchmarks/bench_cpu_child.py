"""One network of the CPU benchmark in a process of its own: it answers, is timed, and says what memory it takes.

What it opens, and how, is a line of ``OPENERS``; everything heavy is imported in the child alone.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from medseg_trt.processes import process_memory
from medseg_trt.timing import timed_runs

Answer = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A network to run, and how."""

    name: str
    group: str  # peer, ours or limit
    opener: str  # a key of OPENERS
    path: Path  # of a graph, a checkpoint or a bundle
    compute: str = "fp32"  # what float parts are computed in
    precision: str = "fp32"  # of the stored weights
    reference: str = "llm-transunet"  # the architecture whose logits it must give


class Child:
    """A process that has opened a variant.

    Raises:
        RuntimeError: the process died, or could not open the variant; the message says why.
    """

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        context = get_context("spawn")
        self._pipe, far_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(far_end, variant), daemon=True)
        self._process.start()
        far_end.close()  # or a death would not be noticed here
        self.opened_s: float = self._received()

    def run(self, images: np.ndarray) -> np.ndarray:
        """Return the logits of images, shown one at a time."""
        return self._asked("run", images)

    def time(self, image: np.ndarray, seconds: float, min_runs: int) -> list[float]:
        """Run one image for ``seconds`` and at least ``min_runs`` times; return milliseconds."""
        return self._asked("time", image, seconds, min_runs)

    def memory(self) -> dict[str, float]:
        """Return ``anonymous_mb`` after the first image, ``resident_mb``, ``peak_resident_mb``, in 10^6 bytes."""
        return self._asked("memory")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _asked(self, *request: Any) -> Any:
        self._pipe.send(request)
        return self._received()

    def _received(self) -> Any:
        try:
            kind, answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"{self.variant.name} died with exit code {self._process.exitcode}") from None
        if kind == "error":
            raise RuntimeError(f"{self.variant.name}: {answer}")
        return answer


def _serve(pipe: Connection, variant: Variant) -> None:
    """Open the variant, say how long that took, and answer until the parent hangs up."""
    try:
        began = time.perf_counter()
        answer = OPENERS[variant.opener](variant)
        pipe.send(("answer", time.perf_counter() - began))
        after_first = 0.0
        while True:
            what, *arguments = pipe.recv()
            if what == "run":
                logits = [answer(arguments[0][:1])]
                after_first = after_first or process_memory()["anonymous_mb"]
                logits += [answer(image[np.newaxis]) for image in arguments[0][1:]]
                pipe.send(("answer", np.concatenate(logits)))
            elif what == "time":
                pipe.send(("answer", _timed(answer, *arguments)))
            else:
                memory = process_memory()
                pipe.send(("answer", memory | {"anonymous_mb": after_first or memory["anonymous_mb"]}))
    except EOFError:
        return
    except Exception as error:  # whatever it is belongs into the table, not on the terminal of a child
        pipe.send(("error", f"{type(error).__name__}: {error}"))


def _timed(answer: Answer, image: np.ndarray, seconds: float, min_runs: int) -> list[float]:
    answer(image)  # refills the caches that other variants have displaced, untimed
    return timed_runs(lambda: answer(image), seconds, min_runs)


def _graph(variant: Variant) -> Answer:
    """Open a graph with the toolkit's own session, which is what ``infer`` uses."""
    from importlib import import_module

    from medseg_trt.sessions.backends import BACKENDS

    opened = import_module(BACKENDS[variant.opener].module).open_graph(
        variant.path, variant.precision, None, variant.compute
    )
    return opened.run


def _pytorch(variant: Variant) -> Answer:
    import torch

    from medseg_trt.train.checkpoint import load_checkpoint

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[variant.compute]
    model = load_checkpoint(variant.path).model().to(dtype)
    if variant.opener == "torch-compile":
        model = torch.compile(model)

    def answer(image: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(image).to(dtype)).float().numpy()

    return answer


def _infer(variant: Variant) -> Answer:
    """Open a bundle as ``infer`` does, all checks included."""
    from medseg_trt.bundles.bundle import load_bundle
    from medseg_trt.sessions.open import open_session

    return open_session(load_bundle(variant.path), precision=variant.precision).run


OPENERS: Mapping[str, Callable[[Variant], Answer]] = {
    "onnxruntime": _graph,
    "openvino": _graph,
    "pytorch": _pytorch,
    "torch-compile": _pytorch,
    "infer": _infer,
}
