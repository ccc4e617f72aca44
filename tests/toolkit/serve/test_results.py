"""Results: which form ``Accept`` chooses, ranges of bytes, and a removal while one is read."""

import asyncio
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request

from medseg_trt.serve import routes_segment
from medseg_trt.serve.jobs import HTTP_JOB, RESULT_FILES, RESULTS
from medseg_trt.serve.protocol_v2 import ProtocolError
from medseg_trt.serve.result_formats import DICOM, JSON, NIFTI, OUTLINES, PNG, VIEW, preferred
from medseg_trt.serve.spool import Job, Spool
from medseg_trt.serve.state import ServerState

OF_PNG = (PNG, JSON, OUTLINES, VIEW)
OF_DICOM = (NIFTI, DICOM, JSON, OUTLINES, VIEW)
CONTENT = bytes(range(256)) * 4000  # several chunks


@pytest.mark.parametrize(
    ("accept", "available", "expected"),
    [
        ("", OF_PNG, PNG),
        ("*/*", OF_PNG, PNG),
        ("image/png;q=0, */*", OF_PNG, JSON),
        ("*/*, image/png;q=0", OF_PNG, JSON),
        ("*/*;q=0.1, image/*;q=0", OF_PNG, JSON),
        ("image/*;q=0, image/png", OF_PNG, PNG),
        ("application/*;q=0, */*", OF_DICOM, None),
        ("application/x-nifti;q=0, application/*", OF_DICOM, DICOM),
        ("application/gzip;Q=0, application/*", OF_DICOM, DICOM),
        ("*/*;q=0.9, application/json;q=0.3", OF_PNG, PNG),
        ("image/png;q=0.2, application/json;q=0.3, */*;q=0.1", OF_PNG, JSON),
        ("application/dicom, image/png;q=0.5", OF_PNG, PNG),
        ("application/*", OF_PNG, JSON),
        ("application/json, image/png", OF_PNG, JSON),
        ("IMAGE/PNG ; q=0.5", OF_PNG, PNG),
        ("application/octet-stream", OF_PNG, PNG),
        ("text/html, */*;q=0", OF_PNG, None),
        ("image/png;q=0", OF_PNG, None),
    ],
)
def test_the_most_precise_range_of_accept_decides(accept, available, expected):
    if expected is not None:
        assert preferred(accept, available) == expected
        return
    with pytest.raises(ProtocolError, match="available") as caught:
        preferred(accept, available)
    assert caught.value.status == 406
    assert VIEW not in str(caught.value)


@pytest.mark.parametrize("quality", ["x", "-1", "2", "nan", "inf", ""])
def test_a_quality_outside_of_0_to_1_is_refused(quality):
    with pytest.raises(ProtocolError, match="quality") as caught:
        preferred(f"image/png;q={quality}", OF_PNG)
    assert caught.value.status == 400


def test_an_excluded_form_is_not_sent(server, inputs):
    body = (inputs / "image0.png").read_bytes()
    status, headers, _ = server.post("/v1/segment", body, Accept="image/png;q=0, */*")
    assert (status, headers["content-type"]) == (200, JSON)


@pytest.fixture(scope="module")
def result(server, inputs, masks) -> tuple[str, bytes]:
    """The address of a job's mask, and its bytes."""
    _, headers, _ = server.post("/v1/segment", (inputs / "volume.nii.gz").read_bytes())
    return server.wait_for_job(headers["location"])["result"], (masks / "volume.nii.gz").read_bytes()


@pytest.mark.parametrize(
    ("wanted", "part"),
    [
        ("bytes=0-", slice(0, None)),
        ("bytes=5-9", slice(5, 10)),
        ("bytes=7-999999999", slice(7, None)),
        ("Bytes= -4", slice(-4, None)),
        ("bytes=-999999999", slice(0, None)),
    ],
)
def test_one_range_of_bytes_is_sent(wanted, part, server, result):
    address, content = result
    status, headers, body = server.get(address, Range=wanted)
    start, stop, _ = part.indices(len(content))
    assert (status, body) == (206, content[part])
    assert headers["content-range"] == f"bytes {start}-{stop - 1}/{len(content)}"


@pytest.mark.parametrize(
    "wanted", ["bytes=", "bytes=x-y", "bytes=9-5", "bytes=99999999-", "bytes=-0", "bytes=-", "bytes"]
)
def test_a_bad_range_is_an_error_like_all_others(wanted, server, result):
    address, content = result
    status, headers, body = server.get(address, Range=wanted)
    assert (status, headers["content-type"], list(json.loads(body))) == (416, JSON, ["error"])
    assert headers["content-range"] == f"bytes */{len(content)}"


@pytest.mark.parametrize("wanted", ["lines=1-2", "nonsense", "bytes=0-1,4-5"])
def test_other_units_and_several_ranges_get_the_whole_mask(wanted, server, result):
    address, content = result
    status, headers, body = server.get(address, Range=wanted)
    assert (status, body, headers["content-length"]) == (200, content, str(len(content)))


def test_a_range_of_another_content_gets_the_whole_mask(server, result):
    address, content = result
    tag = server.get(address)[1]["etag"]
    assert server.get(address, Range="bytes=0-3", If_Range=tag)[::2] == (206, content[:4])
    assert server.get(address, Range="bytes=0-3", If_Range='"other"')[::2] == (200, content)
    assert server.get(address, Range="bytes=0-3", If_Range=tag, Accept=JSON)[0] == 200


def test_the_head_of_a_result_has_its_length_and_no_body(server, result):
    address, content = result
    status, headers, body = server.request("HEAD", address, None)
    assert (status, headers["content-length"], body) == (200, str(len(content)), b"")
    status, headers, _ = server.request("HEAD", address, None, Range="bytes=0-3")
    assert (status, headers["content-length"]) == (200, str(len(content))), "ranges are of GET alone"


def kept_job(folder: Path) -> tuple[ServerState, Job]:
    """Return a finished job with files, as ``routes_segment`` sees it."""
    state = object.__new__(ServerState)
    state.spool = Spool(folder / "spool", 0)
    job = Job(id="0" * 32, kind=HTTP_JOB, model="tiny", state="queued", created=time.time())
    state.spool.add_job(job)
    state.spool.finish(job.id, None)
    results = state.spool.job_folder(job.id) / RESULTS
    results.mkdir(parents=True)
    for media_type in (NIFTI, JSON):
        (results / RESULT_FILES[media_type]).write_bytes(CONTENT)
    found = state.spool.job(job.id)
    assert found is not None
    return state, found


def request_of(accept: str = "*/*") -> Request:
    return Request({"type": "http", "method": "GET", "headers": [(b"accept", accept.encode())]})


async def body_of(response: Any) -> bytes:
    """Run a response as a server does."""
    messages: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        messages.append(message)

    await response({"type": "http", "method": "GET", "headers": []}, receive, send)
    return b"".join(message.get("body", b"") for message in messages)


def test_a_result_that_is_removed_while_it_is_sent_is_sent_to_its_end(tmp_path):
    state, job = kept_job(tmp_path)
    response = routes_segment._result(state, job, request_of())
    for name in (NIFTI, JSON):
        (state.spool.job_folder(job.id) / RESULTS / RESULT_FILES[name]).unlink()
    assert asyncio.run(body_of(response)) == CONTENT
    state.spool.close()


@pytest.mark.parametrize("removed", [(NIFTI,), (NIFTI, JSON)])
@pytest.mark.parametrize("accept", ["*/*", NIFTI])
def test_a_result_whose_files_are_being_removed_is_gone(removed, accept, tmp_path):
    """Another form, which is still there, is no answer."""
    state, job = kept_job(tmp_path)
    assert state.spool.remove_job(job.id)
    for media_type in removed:
        (state.spool.job_folder(job.id) / RESULTS / RESULT_FILES[media_type]).unlink()
    with pytest.raises(ProtocolError) as caught:
        routes_segment._result(state, job, request_of(accept))
    assert caught.value.status == 404
    state.spool.close()


def test_results_are_whole_or_gone_beside_their_removal(server, inputs, masks):
    expected, seen = (masks / "stack.tif").read_bytes(), list[tuple[int, bytes]]()

    def read(address: str) -> None:
        while not seen or seen[-1][0] == 200:
            seen.append(server.get(f"{address}/result")[::2])

    for _ in range(10):
        _, headers, _ = server.post("/v1/segment", (inputs / "stack.tif").read_bytes())
        address = headers["location"]
        server.wait_for_job(address)
        seen.clear()
        readers = [threading.Thread(target=read, args=(address,)) for _ in range(3)]
        for reader in readers:
            reader.start()
        time.sleep(0.05)
        assert server.request("DELETE", address, None)[0] == 204
        for reader in readers:
            reader.join()
        assert {status for status, _ in seen} <= {200, 404}
        assert all(content == expected for status, content in seen if status == 200)


def test_allow_names_every_method_of_an_address(server, result):
    job = result[0].removesuffix("/result")
    for method, path, allowed in (
        ("PUT", job, "DELETE, GET, HEAD"),
        ("DELETE", f"{job}/result", "GET, HEAD"),
        ("GET", "/v1/segment", "POST"),
    ):
        status, headers, body = server.request(method, path, b"" if method == "PUT" else None)
        assert (status, headers["allow"], list(json.loads(body))) == (405, allowed, ["error"])
