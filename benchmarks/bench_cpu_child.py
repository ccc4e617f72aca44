"""A network of the CPU benchmark in a child process, which runs it, times it and reports its memory.

``OPENERS`` lists how a variant is opened; heavy packages are imported in the child alone. The child is this file.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from medseg_trt.processes import ChildProcess, parent, process_memory
from medseg_trt.timing import timed_runs

Network = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A network to run, and how."""

    name: str
    group: str  # peer, ours or limit
    opener: str  # a key of OPENERS
    path: Path  # of a graph, a checkpoint or a bundle
    compute: str = "fp32"  # number format of the float parts
    precision: str = "fp32"  # of the stored weights
    reference: str = "llm-transunet"  # the architecture whose logits it must give


class Child:
    """A process that has opened a variant.

    Raises:
        MedsegError: the process died, or could not open the variant; the message has the reason.
    """

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        request = {field.name: getattr(variant, field.name) for field in fields(variant)} | {"path": str(variant.path)}
        self._child = ChildProcess(Path(__file__), request, variant.name, consequence="nothing is measured")
        try:
            self.opened_s: float = self._child.receive()["opened_s"]
        except BaseException:
            self.close()
            raise

    def run(self, images: np.ndarray) -> np.ndarray:
        """Return the logits of images, which are run one at a time."""
        return self._child.call_for_array({"do": "run"}, images)

    def time(self, image: np.ndarray, seconds: float, min_runs: int) -> list[float]:
        """Run one image for ``seconds`` and at least ``min_runs`` times; return milliseconds."""
        return self._child.call({"do": "time", "seconds": seconds, "min_runs": min_runs}, image)["samples_ms"]

    def memory(self) -> dict[str, float]:
        """Return ``anonymous_mb`` after the first image, ``resident_mb``, ``peak_resident_mb``, in 10^6 bytes."""
        return self._child.call({"do": "memory"})

    def close(self) -> None:
        """End the process."""
        self._child.close()


class Server:
    """The child's side: a network and the memory after its first image."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._after_first_mb = 0.0

    def run(self, images: np.ndarray) -> np.ndarray:
        """Return the logits of images."""
        logits = [self._network(images[:1])]
        self._after_first_mb = self._after_first_mb or process_memory()["anonymous_mb"]
        logits += [self._network(image[np.newaxis]) for image in images[1:]]
        return np.concatenate(logits)

    def time(self, image: np.ndarray, seconds: float, min_runs: int) -> list[float]:
        """Return milliseconds."""
        self._network(image)  # untimed: refills the caches that other variants have displaced
        return timed_runs(lambda: self._network(image), seconds, min_runs)

    def memory(self) -> dict[str, float]:
        """Return the memory of this process."""
        memory = process_memory()
        return memory | {"anonymous_mb": self._after_first_mb or memory["anonymous_mb"]}


def _graph(variant: Variant) -> Network:
    """Open a graph with the toolkit's session, as ``infer`` does."""
    from importlib import import_module

    from medseg_trt.sessions.backends import BACKENDS

    module = import_module(BACKENDS[variant.opener].module)
    return module.open_graph(variant.path, variant.precision, None, variant.compute).run


def _pytorch(variant: Variant) -> Network:
    import torch

    from medseg_trt.train.checkpoint import load_checkpoint

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[variant.compute]
    model = load_checkpoint(variant.path).model().to(dtype)
    if variant.opener == "torch-compile":
        model = torch.compile(model)

    def run(image: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(image).to(dtype)).float().numpy()

    return run


def _infer(variant: Variant) -> Network:
    """Open a bundle as ``infer`` does, all checks included."""
    from medseg_trt.bundles.bundle import load_bundle
    from medseg_trt.sessions.open import open_session

    return open_session(load_bundle(variant.path), precision=variant.precision).run


OPENERS: Mapping[str, Callable[[Variant], Network]] = {
    "onnxruntime": _graph,
    "openvino": _graph,
    "pytorch": _pytorch,
    "torch-compile": _pytorch,
    "infer": _infer,
}


def main() -> None:
    """Open the requested variant, report how long that took, and serve requests until the parent ends."""
    with parent() as (request, connection):
        variant = Variant(**{**request, "path": Path(request["path"])})
        began = time.perf_counter()
        server = Server(OPENERS[variant.opener](variant))
        connection.send({"opened_s": time.perf_counter() - began})
        while (message := connection.receive()) is not None:
            if message["do"] == "memory":
                connection.send(server.memory())
                continue
            images = connection.receive_array(message["shape"], message["dtype"])
            if message["do"] == "run":
                connection.send({}, server.run(images))
            else:
                connection.send({"samples_ms": server.time(images, message["seconds"], message["min_runs"])})


if __name__ == "__main__":
    main()
