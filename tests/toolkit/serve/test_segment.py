"""``/v1/segment``: the bytes that ``infer`` writes, jobs for volumes, and one clear line for what cannot be used."""

import io
import json
import threading
import urllib.request
import zipfile

import numpy as np
import pydicom
import pytest
from dicoms import AXIAL, save_series
from server_process import running_server

from medseg_trt.inference.to_folder import MaskFolder
from medseg_trt.pipeline import infer

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
    assert (status, "not DICOM" in json.loads(body)["error"]) == (406, True)


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
