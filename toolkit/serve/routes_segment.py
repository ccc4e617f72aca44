"""``/v1/segment``: an image in, its mask out; volumes become jobs whose progress and result have addresses."""

import asyncio
import json
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from medseg_trt.errors import InputError
from medseg_trt.serve.batching import CancelledError, RequestQueue
from medseg_trt.serve.file_response import FileResponse
from medseg_trt.serve.http import chunks_of, drop_when_gone
from medseg_trt.serve.jobs import HTTP_JOB, RESULT_FILES, RESULTS
from medseg_trt.serve.model import ServedModel
from medseg_trt.serve.protocol_v2 import ProtocolError
from medseg_trt.serve.result_formats import (
    OUTLINES,
    VIEW,
    EncodedResult,
    Segmentation,
    accepted_ranges,
    encode,
    forms_of,
    outlines_of,
    preferred,
)
from medseg_trt.serve.spool import Job, refused_when_full
from medseg_trt.serve.state import ServerState
from medseg_trt.serve.uploads import UPLOAD, open_upload, public_message, read_upload

EVENT_S = 0.1  # between looks at a job's progress
HEARTBEAT_S = 10.0  # a comment in a silent stream, so that proxies keep it open
JOB_ID_LENGTH = 32
NO_JOB = "there is no such job; its result may have expired"


def routes(state: ServerState) -> list[Route]:
    """Return the routes of segmenting and of jobs."""

    async def segment(request: Request) -> Response:
        return await _segment(state, request)

    async def find(request: Request) -> Job:
        return await asyncio.to_thread(_job, state, request.path_params["job"])

    async def job(request: Request) -> Response:
        return JSONResponse(_describe(state, await find(request)))

    async def remove(request: Request) -> Response:
        if not await asyncio.to_thread(state.jobs.cancel, (await find(request)).id):
            raise ProtocolError("its result is still to be sent to another node; it can be removed after that", 409)
        return Response(status_code=204)

    async def events(request: Request) -> Response:
        job_id = (await find(request)).id
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(_events(state, job_id), media_type="text/event-stream", headers=headers)

    async def result(request: Request) -> Response:
        job = await find(request)
        return await asyncio.to_thread(_result, state, job, request)

    async def models(_request: Request) -> Response:
        return JSONResponse({"models": [_model_summary(model) for model in state.models.values()]})

    return [
        Route("/v1/segment", segment, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/jobs/{job}", job),
        Route("/v1/jobs/{job}", remove, methods=["DELETE"]),
        Route("/v1/jobs/{job}/events", events),
        Route("/v1/jobs/{job}/result", result),
    ]


async def _segment(state: ServerState, request: Request) -> Response:
    model, accept = _model(state, request.query_params.get("model")), _accept_header(request)
    accepted_ranges(accept)  # an invalid header is refused before anything is read
    if "multipart/" in request.headers.get("content-type", ""):
        raise ProtocolError("send the file itself as the body, not a form: curl --data-binary @image.png", 415)
    state.spool.require_space(min(_length(request), state.settings.limits.max_body_bytes))  # more is refused below
    with model.queue.open() as waiting:
        folder = Path(tempfile.mkdtemp(dir=state.uploads))
        keep = False
        try:
            await _receive(state, request, folder / UPLOAD)
            async with drop_when_gone(request, waiting), asyncio.timeout(state.settings.limits.request_timeout_s):
                work = partial(_segment_now, state, model, folder, accept, waiting)
                encoded = await asyncio.get_running_loop().run_in_executor(state.threads, work)
            if encoded is not None:
                return _encoded(encoded)
            keep = True
        except TimeoutError as error:
            waiting.cancel()
            raise ProtocolError("the mask was not ready in time", 503) from error
        finally:
            if not keep and folder.exists():
                await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
    job = await asyncio.to_thread(_accept, state, model, folder)
    address = f"/v1/jobs/{job.id}"
    return JSONResponse(_describe(state, job), status_code=202, headers={"Location": address})


async def _receive(state: ServerState, request: Request, path: Path) -> None:
    with refused_when_full(), path.open("wb") as file:
        async for chunk in chunks_of(request, state.settings.limits):
            state.spool.require_space(len(chunk))  # other requests write too, and a length may not have been declared
            file.write(chunk)


def _segment_now(
    state: ServerState, model: ServedModel, folder: Path, accept: str, waiting: RequestQueue
) -> EncodedResult | None:
    """Return the mask of a single slice in the form that was asked for, or None for a volume, whose upload is kept.

    Raises:
        CancelledError: nobody waits for the answer any more.
    """
    keep = False
    try:
        source = open_upload(folder / UPLOAD, folder, state.settings.limits)
        image = read_upload(source, state.settings.limits)
        if image.num_slices > 1:
            if waiting.cancelled:
                raise CancelledError("the request was cancelled")
            keep = True
            return None
        mask = model.segment(image, waiting)
        result = Segmentation(source=source, image=image, mask=mask, model=model)
        return encode(preferred(accept, forms_of(mask, source)), result, folder)
    except ProtocolError as error:
        raise ProtocolError(public_message(error, folder), error.status) from error
    except InputError as error:
        raise ProtocolError(public_message(error, folder), 422) from error
    finally:
        if not keep:  # here: after a timeout, this thread may still write to the folder
            shutil.rmtree(folder, ignore_errors=True)


def _accept(state: ServerState, model: ServedModel, folder: Path) -> Job:
    """Move an upload into the spool, make sure that it is on the disk, and then add its job."""
    job = Job(id=state.jobs.new_id(), kind=HTTP_JOB, model=model.name, state="queued", created=time.time())
    target = state.spool.job_folder(job.id)
    try:
        target.mkdir(parents=True)
        with (folder / UPLOAD).open("rb") as file:
            os.fsync(file.fileno())
        (folder / UPLOAD).replace(target / UPLOAD)
        state.spool.add_job(job, max_open=state.settings.limits.max_jobs)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    state.jobs.wake()
    return job


def _encoded(encoded: EncodedResult) -> Response:
    headers = {"Content-Disposition": f'inline; filename="{encoded.file_name}"', "Vary": "Accept"}
    return Response(encoded.content, media_type=encoded.media_type, headers=headers)


def _result(state: ServerState, job: Job, request: Request) -> Response:
    if job.state == "failed":
        raise ProtocolError(job.error or "the job failed", 422)
    if job.state != "done":
        raise ProtocolError(f"the job is {job.state}; see /v1/jobs/{job.id}", 409)
    folder = state.spool.job_folder(job.id) / RESULTS
    files = {media_type: folder / name for media_type, name in RESULT_FILES.items() if (folder / name).is_file()}
    _job(state, job.id)  # a removal takes the job first, then its files: while the job is there, all were listed
    wanted = preferred(_accept_header(request), [*files, *((OUTLINES,) if VIEW in files else ())])
    try:
        if wanted == OUTLINES:
            return Response(outlines_of(files[VIEW]), media_type=OUTLINES, headers={"Vary": "Accept"})
        return FileResponse(files[wanted], request, wanted, tag=f"{job.id}-{files[wanted].name}")
    except FileNotFoundError as error:
        raise ProtocolError(NO_JOB, 404) from error


async def _events(state: ServerState, job_id: str) -> AsyncIterator[bytes]:
    """Yield the changes of a job as server-sent events until it is finished or gone."""
    last, silent_since = "", time.monotonic()
    while True:
        job = await asyncio.to_thread(state.spool.job, job_id)
        text = json.dumps({"state": "removed"} if job is None else _describe(state, job))
        if text != last:
            last, silent_since = text, time.monotonic()
            yield f"event: job\ndata: {text}\n\n".encode()
        elif time.monotonic() - silent_since > HEARTBEAT_S:
            silent_since = time.monotonic()
            yield b": still here\n\n"
        if job is None or job.state in ("done", "failed") or not state.is_ready:
            return
        await asyncio.sleep(EVENT_S)


def _describe(state: ServerState, job: Job) -> dict[str, Any]:
    progress = state.jobs.progress(job.id)
    described: dict[str, Any] = {
        "id": job.id,
        "state": job.state,
        "model": job.model,
        "slices_done": progress.done,
        "slices_total": progress.total,
        "address": f"/v1/jobs/{job.id}",
    }
    if job.state == "done":
        described["result"] = f"/v1/jobs/{job.id}/result"
    if job.finished is not None:
        described["kept_until"] = job.finished + state.settings.limits.keep_s
    if job.error is not None:
        described["error"] = job.error
    return described


def _model_summary(model: ServedModel) -> dict[str, Any]:
    classes = model.bundle.classes
    return {
        "name": model.name,
        "version": model.version,
        "window": list(model.bundle.preprocessing.window),
        "classes": [
            {"label": label, "name": name, "color": list(classes.colors[label])}
            for label, name in list(enumerate(classes.names))[1:]
        ],
    }


def _model(state: ServerState, name: str | None) -> ServedModel:
    if name is None and len(state.models) == 1:
        return next(iter(state.models.values()))
    model = state.models.get(name or "")
    if model is None:
        wanted = "name a model" if name is None else f"there is no model {name[:100]!r}"
        raise ProtocolError(f"{wanted}: /v1/segment?model=NAME with one of {', '.join(state.models)}", 404)
    return model


def _job(state: ServerState, job_id: str) -> Job:
    job = state.spool.job(job_id) if len(job_id) == JOB_ID_LENGTH else None
    if job is None:
        raise ProtocolError(NO_JOB, 404)
    return job


def _accept_header(request: Request) -> str:
    return ", ".join(request.headers.getlist("accept"))  # RFC 9110, section 5.3: several lines are one list


def _length(request: Request) -> int:
    declared = request.headers.get("content-length", "")
    return int(declared) if declared.isdecimal() else 0
