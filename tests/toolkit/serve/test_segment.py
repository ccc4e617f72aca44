"""``/v1/segment``: the bytes that ``infer`` writes, jobs for volumes, and one clear line for what cannot be used."""

import asyncio
import http.client
import io
import json
import shutil
import threading
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from dicoms import AXIAL, save_series
from server_process import running_server
from starlette.requests import Request

from medseg_trt.errors import InputError
from medseg_trt.inference.to_folder import MaskFolder
from medseg_trt.pipeline import infer
from medseg_trt.serve import routes_segment
from medseg_trt.serve.batching import BatchQueue, CancelledError
from medseg_trt.serve.model import ServedModel
from medseg_trt.serve.protocol_v2 import ProtocolError
from medseg_trt.serve.settings import Limits, ServeSettings
from medseg_trt.serve.spool import FullError, Spool
from medseg_trt.serve.state import ServerState
from medseg_trt.serve.uploads import UPLOAD, open_upload

LABELLED = {"StudyInstanceUID": "1.2.826.0.1.3680043.8.498.9", "FrameOfReferenceUID": "1.2.826.0.1.3680043.8.498.8"}


@pytest.mark.parametrize(
    ("name", "media_type", "mask"),
    [
        *((f"image{index}.png", "image/png", f"image{index}.png") for index in range(4)),
        ("photo.jpg", "image/png", "photo.png"),
        ("one.tif", "image/png", "one.png"),
    ],
)
def test_a_2d_image_gets_the_bytes_of_infer_at_once(name, media_type, mask, server, inputs, masks):
    status, headers, body = server.post("/v1/segment", (inputs / name).read_bytes())
    assert (status, headers["content-type"]) == (200, media_type)
    assert body == (masks / mask).read_bytes()


@pytest.mark.parametrize(
    ("name", "media_type", "mask"),
    [("volume.nii.gz", "application/x-nifti", "volume.nii.gz"), ("stack.tif", "image/tiff", "stack.tif")],
)
def test_a_volume_becomes_a_job_with_the_bytes_of_infer(name, media_type, mask, server, inputs, masks):
    status, headers, body = server.post("/v1/segment", (inputs / name).read_bytes())
    assert status == 202
    job = server.wait_for_job(headers["location"])
    assert job["state"] == "done", job
    assert job["id"] == json.loads(body)["id"]
    assert job["slices_done"] == job["slices_total"] == (2 if name == "stack.tif" else 11)
    status, headers, body = server.get(job["result"])
    assert (status, headers["content-type"]) == (200, media_type)
    assert body == (masks / mask).read_bytes()
    status, _, body = server.get(job["result"], Accept="application/json")
    assert (status, json.loads(body)["shape"][0]) == (200, 2 if name == "stack.tif" else 11)


def test_areas_equal_those_of_infer(server, inputs, masks):
    status, _, body = server.post("/v1/segment", (inputs / "image0.png").read_bytes(), Accept="application/json")
    assert status == 200
    rows = [line.split(",") for line in (masks / "areas.csv").read_text().splitlines()]
    expected = {row[1]: int(row[3]) for row in rows if row[0] == "image0.png"}
    assert {area["name"]: area["pixels"] for area in json.loads(body)["classes"]} == expected


def test_progress_of_a_job_comes_as_events(server, inputs):
    _, headers, _ = server.post("/v1/segment", (inputs / "volume.nii.gz").read_bytes())
    with urllib.request.urlopen(f"{server.address}{headers['location']}/events", timeout=60) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        events = [json.loads(line[6:]) for line in stream.read().decode().splitlines() if line.startswith("data: ")]
    assert events[-1]["state"] == "done"
    assert [event["state"] for event in events] == sorted(
        (event["state"] for event in events), key=["queued", "running", "done"].index
    )


def test_a_zip_of_a_series_gets_the_segmentation_of_infer(server, bundle, tmp_path):
    save_series(tmp_path / "ct", np.arange(5 * 36 * 28, dtype=np.int16).reshape(5, 36, 28), AXIAL, **LABELLED)
    written = MaskFolder(tmp_path / "masks", mask_format="dicom-seg")
    list(infer([tmp_path / "ct"], bundle, backend="onnxruntime", threads=1, destination=written))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path in sorted((tmp_path / "ct").iterdir()):
            archive.write(path, f"../../{path.name}")  # names of an archive are never used
    for _ in range(2):  # a retry gets the same bytes
        _, headers, _ = server.post("/v1/segment", buffer.getvalue())
        job = server.wait_for_job(headers["location"])
        assert job["state"] == "done", job
        status, _, body = server.get(job["result"], Accept="application/dicom")
        assert status == 200
        assert body == written.masks[0].read_bytes()
    _, _, nifti = server.get(job["result"])
    assert nifti[:2] == b"\x1f\x8b"


def test_one_dicom_file_is_one_image(server, tmp_path):
    save_series(tmp_path / "ct", np.arange(36 * 28, dtype=np.int16).reshape(1, 36, 28), AXIAL, **LABELLED)
    (path,) = (tmp_path / "ct").iterdir()
    status, headers, body = server.post("/v1/segment", path.read_bytes(), Accept="application/dicom")
    assert (status, headers["content-type"]) == (200, "application/dicom")
    assert pydicom.dcmread(io.BytesIO(body)).Modality == "SEG"


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("image/png", "image/png"),
        ("image/*", "image/png"),
        ("application/json;q=0.5, image/png;q=0.4", "application/json"),
        ("text/html, */*;q=0.1", "image/png"),
        ("application/vnd.medseg.outlines+json", "application/vnd.medseg.outlines+json"),
    ],
)
def test_accept_header_selects_the_response_format(accept, expected, server, inputs):
    status, headers, _ = server.post("/v1/segment", (inputs / "image0.png").read_bytes(), Accept=accept)
    assert (status, headers["content-type"]) == (200, expected)


@pytest.mark.parametrize(
    ("body", "headers", "status", "reason"),
    [
        (b"", {}, 400, "the body is empty"),
        (b"nonsense", {}, 415, "send PNG, JPEG"),
        (b"RIFF1234WEBPVP8 ", {}, 422, "convert it to PNG"),
        (b"\x89PNG\r\n\x1a\nbroken", {}, 422, "the file"),
        (b"PK\x03\x04broken", {}, 400, "zip archive is damaged"),
        (b"x", {"Content_Type": "multipart/form-data; boundary=x"}, 415, "send the file itself"),
        (b"x", {"Accept": "image/png;q=x"}, 400, "quality"),
    ],
)
def test_segment_refuses_unusable_requests_in_one_line(body, headers, status, reason, server):
    got, _, text = server.post("/v1/segment", body, **headers)
    error = json.loads(text)["error"]
    assert (got, reason in error, "\n" in error) == (status, True, False), error
    assert str(server.spool) not in error


def test_unavailable_response_format_gives_406(server, inputs):
    status, _, body = server.post("/v1/segment", (inputs / "image0.png").read_bytes(), Accept="application/x-nifti")
    assert status == 406
    error = json.loads(body)["error"]
    assert error.endswith("available: image/png, application/json, application/vnd.medseg.outlines+json")
    status, _, body = server.post("/v1/segment", (inputs / "image0.png").read_bytes(), Accept="application/dicom")
    assert (status, json.loads(body)["error"]) == (406, error)


@pytest.mark.parametrize("path", ["/v1/segment", "/v1/jobs/ID/result"])
def test_a_client_that_accepts_nothing_gets_nothing(path, server, inputs):
    body = (inputs / ("stack.tif" if "ID" in path else "image0.png")).read_bytes()
    if "ID" in path:
        _, headers, _ = server.post("/v1/segment", body)
        path = server.wait_for_job(headers["location"])["result"]
    status, _, text = server.request("GET" if "result" in path else "POST", path, body, Accept="*/*;q=0")
    assert (status, list(json.loads(text))) == (406, ["error"])


def test_several_accept_lines_are_one_list(server, inputs):
    connection = http.client.HTTPConnection(server.netloc, timeout=60)
    body = (inputs / "image0.png").read_bytes()
    connection.putrequest("POST", "/v1/segment")
    for name, value in (("Accept", "text/html"), ("Accept", "application/json"), ("Content-Length", str(len(body)))):
        connection.putheader(name, value)
    connection.endheaders(body)
    response = connection.getresponse()
    assert (response.status, response.headers["content-type"]) == (200, "application/json")
    response.read()
    connection.close()


def test_an_unknown_model_and_an_unknown_job(server):
    status, _, body = server.post("/v1/segment?model=other", b"x")
    assert (status, "tiny" in json.loads(body)["error"]) == (404, True)
    assert server.get("/v1/jobs/" + "0" * 32)[0] == 404


def test_deleted_job_gives_404(server, inputs):
    _, headers, _ = server.post("/v1/segment", (inputs / "volume.nii.gz").read_bytes())
    server.wait_for_job(headers["location"])
    assert server.request("DELETE", headers["location"], None)[0] == 204
    assert server.get(headers["location"])[0] == 404


def test_a_zip_bomb_is_refused(bundle, tmp_path, inputs):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.dcm", bytes(3 << 20))
    with running_server([bundle], tmp_path / "spool", "--max-body-mb", "1") as small:
        status, _, body = small.post("/v1/segment", buffer.getvalue())
        assert (status, "unpacks to more" in json.loads(body)["error"]) == (413, True)
        status, _, body = small.post("/v1/segment", bytes(2 << 20))
        assert (status, "bytes" in json.loads(body)["error"]) == (413, True)
        assert small.post("/v1/segment", (inputs / "image0.png").read_bytes())[0] == 200
        assert list((small.spool / "uploads").iterdir()) == []


def test_many_clients_at_once_get_their_own_masks(server, inputs, masks):
    names = [f"image{index % 4}" for index in range(32)]
    results: dict[int, bytes] = {}

    def send(number: int) -> None:
        results[number] = server.post("/v1/segment", (inputs / f"{names[number]}.png").read_bytes())[2]

    _, headers, _ = server.post("/v1/segment", (inputs / "volume.nii.gz").read_bytes())
    threads = [threading.Thread(target=send, args=(number,)) for number in range(len(names))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, name in enumerate(names):
        assert results[number] == (masks / f"{name}.png").read_bytes()
    assert server.wait_for_job(headers["location"])["state"] == "done"
    assert server.get(f"{headers['location']}/result")[2] == (masks / "volume.nii.gz").read_bytes()


def test_a_bundle_that_is_replaced_while_serving_changes_nothing(server, bundle, inputs, masks):
    manifest = (bundle / "manifest.json").read_bytes()
    try:
        (bundle / "manifest.json").write_text("{}")
        body = server.post("/v1/segment", (inputs / "image0.png").read_bytes())[2]
    finally:
        (bundle / "manifest.json").write_bytes(manifest)
    assert body == (masks / "image0.png").read_bytes()


def segment_now(folder: Path, content: bytes, *, cancelled: bool) -> Any:
    """Run what a thread does for a request, without a server."""
    (folder / UPLOAD).write_bytes(content)
    queue = BatchQueue(max_batch=1, delay_s=0.0, max_requests=1)
    with queue.open() as waiting:
        if cancelled:
            waiting.cancel()
        try:
            return routes_segment._segment_now(bare_state(folder), object.__new__(ServedModel), folder, "", waiting)
        finally:
            queue.close()


def bare_state(folder: Path, **limits: int) -> ServerState:
    """Return what the functions below need of a server."""
    state = object.__new__(ServerState)
    state.settings = ServeSettings(bundles=(folder,), spool=folder, limits=Limits(**limits))
    return state


def test_a_volume_becomes_no_job_where_its_client_has_gone(inputs, tmp_path):
    volume = (inputs / "stack.tif").read_bytes()
    assert segment_now(tmp_path, volume, cancelled=False) is None
    assert (tmp_path / UPLOAD).read_bytes() == volume, "it is moved into the spool"
    with pytest.raises(CancelledError):
        segment_now(tmp_path, volume, cancelled=True)
    assert not tmp_path.exists()


def test_a_thread_that_outlives_its_request_leaves_no_file(tmp_path, monkeypatch):
    """After a timeout, the request removes the folder while its thread may still write there."""

    def slow(_path: Path, folder: Path, _limits: Limits) -> None:
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / "00000.dcm").write_bytes(b"of an archive")
        raise InputError(f"{folder} is gone")

    monkeypatch.setattr(routes_segment, "open_upload", slow)
    with pytest.raises(ProtocolError, match="the upload is gone"):
        segment_now(tmp_path, b"x", cancelled=True)
    assert not tmp_path.exists()


def test_a_body_without_a_length_is_refused_when_the_disk_gets_full(tmp_path, monkeypatch):
    left = 2500

    def require_space(num_bytes: int) -> None:
        nonlocal left
        left -= num_bytes
        if left < 0:
            raise FullError("the disk of the spool is full")

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": bytes(1000), "more_body": True}  # for ever

    request = Request({"type": "http", "headers": [(b"transfer-encoding", b"chunked")]}, receive)
    state = bare_state(tmp_path, max_body_bytes=10_000)
    state.spool = Spool(tmp_path / "spool", 0)
    monkeypatch.setattr(state.spool, "require_space", require_space)
    with pytest.raises(FullError):
        asyncio.run(routes_segment._receive(state, request, tmp_path / UPLOAD))
    state.spool.close()


def test_an_archive_that_fills_the_disk_is_not_called_damaged(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / UPLOAD, "w") as archive:
        archive.writestr("a.dcm", bytes(100))

    def full(*_arguments) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(FullError):
        open_upload(tmp_path / UPLOAD, tmp_path, Limits())
