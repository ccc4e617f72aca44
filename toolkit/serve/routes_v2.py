"""The routes of the Open Inference Protocol: health, metadata, repository index, statistics and inference."""

import asyncio
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy import ndarray
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from medseg_trt import __version__
from medseg_trt.export.graph.interface import INPUT, MASK, OUTPUT, RESAMPLED, SIZE
from medseg_trt.serve.batching import RequestQueue
from medseg_trt.serve.http import drop_when_gone, read_body
from medseg_trt.serve.model import ServedModel
from medseg_trt.serve.protocol_v2 import (
    HEADER_LENGTH,
    InferRequest,
    ProtocolError,
    TensorSpec,
    decompress,
    format_response,
    parse_request,
)
from medseg_trt.serve.state import ServerState

MAX_IMAGES = 64  # prepared images in one request
BYTES_PER_NUMBER, MAX_HEAD_BYTES = 24, 1 << 20  # as JSON text, and for everything around the numbers
MAX_MASK_PIXELS = 1 << 24  # of all masks that one request asks for
EXTENSIONS = ["binary_tensor_data", "model_configuration", "model_repository", "statistics"]
PLATFORM = "medseg_trt"
CODECS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": partial(zlib.compress, level=1, wbits=31),
    "deflate": partial(zlib.compress, level=1),
}
NANOSECONDS = 1e9


def routes(state: ServerState) -> list[Route]:
    """Return the routes below ``/v2``."""

    async def live(_request: Request) -> Response:
        return Response()

    async def ready(_request: Request) -> Response:
        return Response(status_code=200 if state.is_ready and state.spool.is_there else 503)

    async def server(_request: Request) -> Response:
        return JSONResponse({"name": "medseg-trt", "version": __version__, "extensions": EXTENSIONS})

    async def model_ready(request: Request) -> Response:
        _model(state, request)
        return Response(status_code=200 if state.is_ready and state.spool.is_there else 503)

    async def metadata(request: Request) -> Response:
        return JSONResponse(model_metadata(_model(state, request)))

    async def config(request: Request) -> Response:
        return JSONResponse(_config(_model(state, request), state.settings.limits.max_batch))

    async def statistics(request: Request) -> Response:
        models = [_model(state, request)] if "model" in request.path_params else state.models.values()
        return JSONResponse({"model_stats": [_statistics(model) for model in models]})

    async def index(_request: Request) -> Response:
        reason = "READY" if state.is_ready else "UNAVAILABLE"
        return JSONResponse(
            [{"name": model.name, "version": model.version, "state": reason} for model in state.models.values()]
        )

    async def fixed(_request: Request) -> Response:
        raise ProtocolError("models are chosen when the server starts; they cannot be loaded or unloaded")

    async def infer(request: Request) -> Response:
        return await _infer(state, request)

    per_model: tuple[tuple[str, str, Callable[[Request], Awaitable[Response]]], ...] = (
        ("", "GET", metadata),
        ("/ready", "GET", model_ready),
        ("/config", "GET", config),
        ("/stats", "GET", statistics),
        ("/infer", "POST", infer),
    )
    return [
        Route("/v2", server),
        Route("/v2/health/live", live),
        Route("/v2/health/ready", ready),
        Route("/v2/models/stats", statistics),
        Route("/v2/repository/index", index, methods=["POST"]),
        Route("/v2/repository/models/{model}/load", fixed, methods=["POST"]),
        Route("/v2/repository/models/{model}/unload", fixed, methods=["POST"]),
        *(
            Route(f"/v2/models/{{model}}{version}{path}", endpoint, methods=[method])
            for path, method, endpoint in per_model
            for version in ("", "/versions/{version}")
        ),
    ]


def tensors(model: ServedModel) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Return the inputs and outputs of a model: logits, or masks where the bundle gives them."""
    content = model.bundle.content
    inputs = [TensorSpec(name=INPUT, datatype="FP32", shape=(-1, 3, *content.preprocessing.image_size))]
    logits = TensorSpec(name=OUTPUT, datatype="FP32", shape=(-1, content.model.num_classes, *content.model.image_size))
    if not model.session.gives_masks:
        return tuple(inputs), (logits,)
    inputs.append(TensorSpec(name=SIZE, datatype="INT64", shape=(2,)))
    if content.preprocessing.spacing_mm is not None:
        inputs.append(TensorSpec(name=RESAMPLED, datatype="INT64", shape=(2,)))
    return tuple(inputs), (logits, TensorSpec(name=MASK, datatype="UINT8", shape=(-1, -1, -1)))


def model_metadata(model: ServedModel) -> dict[str, Any]:
    """Return a model's metadata as the protocol states it."""
    inputs, outputs = tensors(model)
    return {
        "name": model.name,
        "versions": [model.version],
        "platform": PLATFORM,
        "inputs": [tensor.as_json() for tensor in inputs],
        "outputs": [tensor.as_json() for tensor in outputs],
        "parameters": {
            "classes": ",".join(model.bundle.classes.names),
            "bundle_sha256": model.digest,
            "session": model.session.description,
        },
    }


def _model(state: ServerState, request: Request) -> ServedModel:
    name, version = request.path_params["model"], request.path_params.get("version")
    model = state.models.get(name)
    if model is None:
        raise ProtocolError(f"there is no model {name[:100]!r}; models: {', '.join(state.models)}", 404)
    if version not in (None, model.version):
        raise ProtocolError(f"model {name!r} has no version {version[:100]!r}; it has {model.version}", 404)
    return model


def _config(model: ServedModel, max_batch: int) -> dict[str, Any]:
    inputs, outputs = tensors(model)
    kinds = {"FP32": "TYPE_FP32", "INT64": "TYPE_INT64", "UINT8": "TYPE_UINT8"}

    def described(tensor: TensorSpec) -> dict[str, Any]:
        return {"name": tensor.name, "data_type": kinds[tensor.datatype], "dims": list(tensor.shape)}

    return {
        "name": model.name,
        "platform": PLATFORM,
        "backend": model.session.backend,
        "max_batch_size": 0,  # the first axis is part of the shape
        "input": [described(tensor) for tensor in inputs],
        "output": [described(tensor) for tensor in outputs],
        "dynamic_batching": {"preferred_batch_size": [max_batch]},
    }


def _statistics(model: ServedModel) -> dict[str, Any]:
    done = model.queue.statistics
    compute_ns, queue_ns = int(done.run_s * NANOSECONDS), int(done.queue_s * NANOSECONDS)
    return {
        "name": model.name,
        "version": model.version,
        "inference_count": done.slices,
        "execution_count": done.runs,
        "inference_stats": {
            "success": {"count": done.slices, "ns": compute_ns + queue_ns},
            "queue": {"count": done.slices, "ns": queue_ns},
            "compute_infer": {"count": done.slices, "ns": compute_ns},
            "fail": {"count": done.cancelled + done.refused, "ns": 0},
        },
    }


async def _infer(state: ServerState, request: Request) -> Response:
    model, limits = _model(state, request), state.settings.limits
    encoding = request.headers.get("content-encoding", "").strip().lower()
    loop = asyncio.get_running_loop()
    limits = replace(limits, max_body_bytes=min(limits.max_body_bytes, _largest_body(model)))
    with model.queue.open() as waiting:
        body = await read_body(request, limits)
        async with drop_when_gone(request, waiting):
            work = partial(
                _run, model, body, encoding, request.headers.get(HEADER_LENGTH), limits.max_body_bytes, waiting
            )
            content, json_bytes = await loop.run_in_executor(state.threads, work)
    headers = {"Content-Type": "application/json" if json_bytes is None else "application/octet-stream"}
    if json_bytes is not None:
        headers[HEADER_LENGTH] = str(json_bytes)
    accepted = [
        word.strip().partition(";")[0] for word in request.headers.get("accept-encoding", "").lower().split(",")
    ]
    for name, compress in CODECS.items():
        if name in accepted:
            content = await loop.run_in_executor(state.threads, compress, content)
            headers["Content-Encoding"] = name
            break
    return Response(content, headers=headers)


def _largest_body(model: ServedModel) -> int:
    height, width = model.bundle.preprocessing.image_size
    return MAX_IMAGES * 3 * height * width * BYTES_PER_NUMBER + MAX_HEAD_BYTES


def _run(
    model: ServedModel, body: bytes, encoding: str, header_length: str | None, max_bytes: int, waiting: RequestQueue
) -> tuple[bytes, int | None]:
    parsed = parse_request(decompress(body, encoding, max_bytes), header_length)
    head = {"model_name": model.name, "model_version": model.version}
    return format_response(head, _outputs(model, parsed, waiting), parsed)


def _outputs(model: ServedModel, parsed: InferRequest, waiting: RequestQueue) -> dict[str, ndarray]:
    inputs, outputs = tensors(model)
    known = {tensor.name for tensor in outputs}
    wanted = {output.name for output in parsed.outputs} if parsed.outputs is not None else known
    if unknown := wanted - known:
        raise ProtocolError(f"there is no output {min(unknown)!r}; outputs: {', '.join(sorted(known))}")
    needed = {tensor.name for tensor in inputs} if MASK in wanted else {INPUT}
    allowed = needed | {tensor.name for tensor in inputs}
    if not needed <= parsed.inputs.keys() or not parsed.inputs.keys() <= allowed:
        raise ProtocolError(f"the inputs are {', '.join(sorted(parsed.inputs))}; needed: {', '.join(sorted(needed))}")
    values = _images(model, parsed.inputs[INPUT])
    results: dict[str, ndarray] = {}
    if OUTPUT in wanted:
        results[OUTPUT] = model.run(values, waiting)
    if MASK in wanted:
        size = _size(parsed, SIZE, len(values))
        with_spacing = RESAMPLED in needed
        resampled = _size(parsed, RESAMPLED, len(values)) if with_spacing else model.bundle.preprocessing.image_size
        results[MASK] = model.run_masks(values, size, resampled, waiting)
    return results


def _images(model: ServedModel, values: ndarray) -> ndarray:
    size = model.bundle.preprocessing.image_size
    if values.dtype != np.float32 or values.ndim != 4 or values.shape[1:] != (3, *size):
        raise ProtocolError(
            f"{INPUT} is {values.dtype} {list(values.shape)}; it must be FP32 [-1, 3, {size[0]}, {size[1]}]"
        )
    if not 1 <= len(values) <= MAX_IMAGES:
        raise ProtocolError(f"{INPUT} has {len(values)} images; 1 to {MAX_IMAGES} are possible")
    if not np.isfinite(values).all():
        raise ProtocolError(f"{INPUT} holds NaN or infinite values")
    return values


def _size(parsed: InferRequest, name: str, num_images: int) -> tuple[int, int]:
    values = parsed.inputs[name]
    if values.shape != (2,) or values.dtype != np.int64 or values.min() < 1:
        raise ProtocolError(f"{name} must be INT64 [2]: height and width, at least 1")
    height, width = int(values[0]), int(values[1])
    if num_images * height * width > MAX_MASK_PIXELS:
        raise ProtocolError(f"{name}: masks of more than {MAX_MASK_PIXELS} pixels in one request are refused", 413)
    return height, width
