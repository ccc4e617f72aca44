"""DICOMweb: STOW-RS to store, QIDO-RS to search by UID, WADO-RS to fetch; of what was received and what was made of it.

Source: DICOM PS3.18 sections 10.4 to 10.6.
"""

import asyncio
import json
import uuid
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from medseg_trt.errors import require
from medseg_trt.serve import multipart
from medseg_trt.serve.http import read_body
from medseg_trt.serve.objects import OUT_OF_RESOURCES, RefusedError, StoredObject, accept, stored_objects
from medseg_trt.serve.protocol_v2 import WHOLE_NUMBER, ProtocolError
from medseg_trt.serve.spool import FullError, Instance
from medseg_trt.serve.state import ServerState

DICOM_JSON = "application/dicom+json"
ROOT = "/dicomweb"
LEVELS = ("study", "series", "uid")  # fields of StoredObject
TAGS = {"study": "0020000D", "series": "0020000E", "uid": "00080018"}
KEYWORDS = {"StudyInstanceUID": "study", "SeriesInstanceUID": "series", "SOPInstanceUID": "uid"}
PAGING = ("limit", "offset", "includefield", "fuzzymatching")
MAX_RESULTS = 1000
MAX_STORES = 2  # requests that are held in memory at once
DESCRIBED = [
    "Modality",
    "StudyDate",
    "StudyTime",
    "SeriesNumber",
    "InstanceNumber",
    "Rows",
    "Columns",
    "NumberOfFrames",
]
MISSING_SOP, FAILURE_REASON = "00081198", "00081197"


def routes(state: ServerState) -> list[Route]:
    """Return the routes below ``/dicomweb``; without a DICOM node there are none."""
    if state.settings.dicom is None:
        return []

    receiving = asyncio.Semaphore(MAX_STORES)

    async def store(request: Request) -> Response:
        return await _store(state, request, receiving)

    def search(level: str) -> Callable[..., Any]:
        async def handle(request: Request) -> Response:
            objects = await asyncio.to_thread(_matching, state, request)
            return _json(await asyncio.to_thread(_search, objects, level, request))

        return handle

    async def retrieve(request: Request) -> Response:
        objects = await asyncio.to_thread(_matching, state, request)
        if not objects:
            raise ProtocolError("there is no such object here", 404)
        boundary = uuid.uuid4().hex
        kind = f'multipart/related; type="application/dicom"; boundary={boundary}'
        return StreamingResponse(
            multipart.join([stored.path for stored in objects], boundary), headers={"Content-Type": kind}
        )

    async def metadata(request: Request) -> Response:
        objects = await asyncio.to_thread(_matching, state, request)
        if not objects:
            raise ProtocolError("there is no such object here", 404)
        return _json(await asyncio.to_thread(lambda: [_header(stored) for stored in objects]))

    study = f"{ROOT}/studies/{{study}}"
    series = f"{study}/series/{{series}}"
    instance = f"{series}/instances/{{uid}}"
    return [
        Route(f"{ROOT}/studies", store, methods=["POST"]),
        Route(study, store, methods=["POST"]),
        Route(f"{ROOT}/studies", search("study")),
        Route(f"{ROOT}/series", search("series")),
        Route(f"{ROOT}/instances", search("uid")),
        Route(f"{study}/series", search("series")),
        Route(f"{study}/instances", search("uid")),
        Route(f"{series}/instances", search("uid")),
        *(Route(path, retrieve) for path in (study, series, instance)),
        *(Route(f"{path}/metadata", metadata) for path in (study, series, instance)),
    ]


async def _store(state: ServerState, request: Request, receiving: asyncio.Semaphore) -> Response:
    boundary = multipart.boundary_of(request.headers.get("content-type", ""))
    async with receiving:
        body = await read_body(request, state.settings.limits)
        transfer = object()
        try:
            return await _store_parts(state, request, multipart.parts(body, boundary), transfer)
        finally:
            state.storing.release(transfer)


async def _store_parts(state: ServerState, request: Request, contents: Iterable[bytes], transfer: object) -> Response:
    def take(content: bytes) -> Instance:
        instance = accept(state.spool, content)
        state.storing.note(transfer, instance.series)
        return instance

    stored: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    for content in contents:
        try:
            instance = await asyncio.get_running_loop().run_in_executor(state.threads, take, content)
        except (RefusedError, FullError) as error:
            status = error.status if isinstance(error, RefusedError) else OUT_OF_RESOURCES
            failed.append({FAILURE_REASON: {"vr": "US", "Value": [status]}})
            continue
        if request.path_params.get("study") not in (None, instance.study):
            failed.append({FAILURE_REASON: {"vr": "US", "Value": [0xA900]}})
            continue
        stored.append(
            {
                "00081150": {"vr": "UI", "Value": [instance.sop_class]},
                "00081155": {"vr": "UI", "Value": [instance.uid]},
                "00081190": {"vr": "UR", "Value": [f"{ROOT}/studies/{instance.study}"]},
            }
        )
    content = {"00081199": {"vr": "SQ", "Value": stored}} | (
        {MISSING_SOP: {"vr": "SQ", "Value": failed}} if failed else {}
    )
    status = 200 if not failed else 202 if stored else 409
    return Response(json.dumps(content), status_code=status, media_type=DICOM_JSON)


def _matching(state: ServerState, request: Request) -> list[StoredObject]:
    """Return the objects that the path and the query name."""
    wanted: dict[str, str] = dict(request.path_params)
    for key, value in request.query_params.multi_items():
        field = KEYWORDS.get(key) or next((name for name, tag in TAGS.items() if tag == key), None)
        if field is not None:
            wanted[field] = value
        elif key.lower() not in PAGING:
            raise ProtocolError(f"objects can be searched by {', '.join(KEYWORDS)}, not by {key[:40]!r}")
    return [
        stored
        for stored in stored_objects(state.spool)
        if all(getattr(stored, field) in value.split(",") for field, value in wanted.items())
    ]


def _search(objects: Sequence[StoredObject], level: str, request: Request) -> list[dict[str, Any]]:
    fields = LEVELS[: LEVELS.index(level) + 1]

    def key(stored: StoredObject) -> tuple[str, ...]:
        return tuple(getattr(stored, field) for field in fields)

    limit, offset = (_number(request, name, default) for name, default in (("limit", MAX_RESULTS), ("offset", 0)))
    groups = [list(group) for _, group in groupby(sorted(objects, key=key), key=key)]
    return [_described(group, level) for group in groups[offset : offset + min(limit, MAX_RESULTS)]]


def _described(group: Sequence[StoredObject], level: str) -> dict[str, Any]:
    first = group[0]
    described = {
        TAGS[field]: {"vr": "UI", "Value": [getattr(first, field)]} for field in LEVELS[: LEVELS.index(level) + 1]
    }
    if level == "uid":
        described["00080016"] = {"vr": "UI", "Value": [first.sop_class]}
    elements = _read(first, DESCRIBED).to_json_dict()
    counts = {"study": "00201208", "series": "00201209"}
    if level in counts:
        described[counts[level]] = {"vr": "IS", "Value": [len(group)]}
    return described | {tag: value for tag, value in elements.items() if tag not in described}


def _header(stored: StoredObject) -> dict[str, Any]:
    return {tag: value for tag, value in _read(stored, None).to_json_dict().items() if not tag.startswith("0002")}


def _read(stored: StoredObject, tags: list[str] | None) -> Any:
    pydicom = require("pydicom", "medical")
    try:
        return pydicom.dcmread(stored.path, stop_before_pixels=True, specific_tags=tags)
    except FileNotFoundError as error:
        raise ProtocolError("an object was removed meanwhile; search again", 503) from error


def _number(request: Request, name: str, default: int) -> int:
    text = request.query_params.get(name, str(default))
    if not WHOLE_NUMBER.fullmatch(text):
        raise ProtocolError(f"{name} is no whole number of at most 18 digits")
    return int(text)


def _json(content: list[dict[str, Any]]) -> Response:
    if not content:
        return Response(status_code=204)  # which has no body
    return Response(json.dumps(content), media_type=DICOM_JSON)
