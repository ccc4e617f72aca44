"""A description of the HTTP interface in OpenAPI, for clients and for tests that generate requests."""

from collections.abc import Mapping
from typing import Any

from medseg_trt import __version__
from medseg_trt.serve.result_formats import DICOM, JSON, NIFTI, OUTLINES, PNG, TIFF
from medseg_trt.serve.state import ServerState

ERROR = {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]}
BINARY = {"type": "string", "format": "binary"}
TENSOR = {
    "type": "object",
    "required": ["name", "shape", "datatype"],
    "properties": {
        "name": {"type": "string"},
        "shape": {"type": "array", "items": {"type": "integer"}},
        "datatype": {"type": "string"},
        "data": {"type": "array", "items": {"type": "number"}},
        "parameters": {"type": "object"},
    },
}
INFER = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": {"type": "string"},
        "inputs": {"type": "array", "items": TENSOR},
        "outputs": {"type": "array", "items": {"type": "object", "properties": {"name": {"type": "string"}}}},
        "parameters": {"type": "object"},
    },
}
MASKS = {media_type: {"schema": BINARY} for media_type in (PNG, TIFF, NIFTI, DICOM)}
JSONS = {media_type: {"schema": {"type": "object"}} for media_type in (JSON, OUTLINES)}


def openapi(state: ServerState) -> dict[str, Any]:
    """Return the document."""
    model = _parameter("model", "path", enum=list(state.models))
    paths: dict[str, Any] = {
        "/v2": _get("metadata of the server"),
        "/v2/health/live": _get("200 while the process lives"),
        "/v2/health/ready": _get("200 while new work is taken"),
        "/v2/repository/index": {"post": _operation("the models")},
        "/v2/models/stats": _get("statistics of all models"),
        "/v2/models/{model}": _get("metadata of a model", model),
        "/v2/models/{model}/ready": _get("200 while the model takes new work", model),
        "/v2/models/{model}/stats": _get("statistics of a model", model),
        "/v2/models/{model}/infer": {
            "post": _operation("run the network", model) | {"requestBody": _body({JSON: {"schema": INFER}})}
        },
        "/v1/models": _get("classes and colours"),
        "/v1/segment": {
            "post": _operation("segment an image", _parameter("model", "query", required=False))
            | {
                "requestBody": _body({"application/octet-stream": {"schema": BINARY}}),
                "responses": {
                    "200": {"description": "the mask", "content": MASKS | JSONS},
                    "202": {"description": "a job", "content": {JSON: {"schema": {"type": "object"}}}},
                    "default": _failure(),
                },
            }
        },
        "/v1/jobs/{job}": {
            "get": _operation("state of a job", _parameter("job", "path")),
            "delete": _operation("cancel and remove a job", _parameter("job", "path")),
        },
        "/v1/jobs/{job}/result": _get("the mask of a job", _parameter("job", "path")),
        "/metrics": _get("metrics for Prometheus"),
    }
    return {"openapi": "3.1.0", "info": {"title": "medseg-trt", "version": __version__}, "paths": paths}


def _parameter(name: str, location: str, *, required: bool = True, enum: list[str] | None = None) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"} | ({"enum": enum} if enum else {})
    return {"name": name, "in": location, "required": required, "schema": schema}


def _operation(summary: str, *parameters: Mapping[str, Any]) -> dict[str, Any]:
    responses = {"200": {"description": "success"}, "default": _failure()}
    return {"summary": summary, "parameters": list(parameters), "responses": responses}


def _get(summary: str, *parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {"get": _operation(summary, *parameters)}


def _body(content: Mapping[str, Any]) -> dict[str, Any]:
    return {"required": True, "content": dict(content)}


def _failure() -> dict[str, Any]:
    return {"description": "an error", "content": {JSON: {"schema": ERROR}}}
