"""DICOMweb with dicomweb-client: store a series, find it, fetch its segmentation; and to another DICOMweb service."""

import copy
import json
import shutil
import socket
import struct
import time
from contextlib import suppress

import numpy as np
import pydicom
import pytest
import requests
from dicoms import AXIAL, save_series
from server_process import running_server

from medseg_trt.inference.to_folder import MaskFolder
from medseg_trt.pipeline import infer
from medseg_trt.serve import multipart

dicomweb = pytest.importorskip("dicomweb_client.api")
STUDY = "1.2.826.0.1.3680043.8.498.31"
QUICK = ("--dicom-port", "0", "--quiet-s", "0.2", "--retry-s", "0.2")


def write(folder):
    pixels = np.random.default_rng(3).integers(0, 255, (4, 36, 28)).astype(np.int16)
    labelled = {"StudyInstanceUID": STUDY, "SeriesInstanceUID": f"{STUDY}.1", "FrameOfReferenceUID": f"{STUDY}.2"}
    save_series(folder, pixels, AXIAL, order=range(4), **labelled)
    return [pydicom.dcmread(path) for path in sorted(folder.iterdir())]


def wait_for_segmentation(client) -> pydicom.Dataset:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for series in client.search_for_series(STUDY):
            if series["00080060"]["Value"] == ["SEG"]:
                (made,) = client.retrieve_series(STUDY, series["0020000E"]["Value"][0])
                return made
        time.sleep(0.1)
    raise AssertionError("no segmentation")


def test_store_search_and_retrieve(bundle, tmp_path):
    datasets = write(tmp_path / "ct")
    written = MaskFolder(tmp_path / "masks", mask_format="dicom-seg")
    list(infer([tmp_path / "ct"], bundle, backend="onnxruntime", threads=1, destination=written))
    with running_server([bundle], tmp_path / "second", *QUICK) as second:
        options = ("--send-to", f"{second.address}/dicomweb")
        with running_server([bundle], tmp_path / "first", *QUICK, *options) as first:
            client = dicomweb.DICOMwebClient(f"{first.address}/dicomweb")
            answer = client.store_instances(datasets)
            assert len(answer.ReferencedSOPSequence) == 4
            for dataset in datasets:  # another sender writes its own meta information
                dataset.file_meta.ImplementationVersionName = "ANOTHER"
            assert len(client.store_instances(datasets).ReferencedSOPSequence) == 4
            changed = copy.deepcopy(datasets[0])
            changed.SliceLocation = 99.0
            with pytest.raises(requests.HTTPError, match="409"):
                client.store_instances([changed])
            made = wait_for_segmentation(client)
            ours = pydicom.dcmread(written.masks[0])
            assert made.SOPInstanceUID == ours.SOPInstanceUID
            assert made.PixelData == ours.PixelData
            (study,) = client.search_for_studies(search_filters={"StudyInstanceUID": STUDY})
            assert study["00201208"]["Value"] == [5]
            assert len(client.search_for_instances(STUDY, f"{STUDY}.1")) == 4
            assert len(client.search_for_instances(STUDY, limit=2, offset=4)) == 1
            got = client.retrieve_instance(STUDY, f"{STUDY}.1", datasets[0].SOPInstanceUID)
            assert got.PixelData == datasets[0].PixelData
            assert len(client.retrieve_study(STUDY)) == 5
            metadata = client.retrieve_instance_metadata(STUDY, f"{STUDY}.1", datasets[1].SOPInstanceUID)
            assert pydicom.Dataset.from_json(metadata).Rows == 36
            assert client.search_for_studies(search_filters={"StudyInstanceUID": "1.2.3"}) == []
            status, _, body = first.get("/dicomweb/studies/1.2.3")
            assert (status, "no such object" in json.loads(body)["error"]) == (404, True)
            status, _, body = first.get("/dicomweb/studies?PatientName=Doe")
            assert (status, "searched by" in json.loads(body)["error"]) == (400, True)
            refused = [line for line in first.lines if "HTTP status 409" in line]
            deadline = time.monotonic() + 30
            while not refused and time.monotonic() < deadline:
                refused = [line for line in first.lines if "HTTP status 409" in line]
                time.sleep(0.1)
            assert refused, "our own node takes images alone, so it refuses a segmentation, and that is said"


@pytest.mark.parametrize(
    ("body", "content_type", "status"),
    [
        (b"", "application/dicom", 415),
        (b"", 'multipart/related; type="application/dicom"', 415),
        (b"x", 'multipart/related; type="application/dicom"; boundary=b', 400),
        (b"--b\r\nno end", 'multipart/related; type="application/dicom"; boundary=b', 400),
        (b"--b\r\n\r\nnothing\r\n--b--", 'multipart/related; type="application/dicom"; boundary=b', 409),
    ],
)
def test_stow_rs_rejects_malformed_bodies(body, content_type, status, node_server):
    assert node_server.post("/dicomweb/studies", body, Content_Type=content_type)[0] == status


@pytest.fixture(scope="module")
def node_server(bundle, tmp_path_factory):
    with running_server([bundle], tmp_path_factory.mktemp("web") / "spool", *QUICK) as server:
        yield server


@pytest.mark.parametrize(
    ("query", "status"),
    [("limit=5", 204), ("StudyInstanceUID=9.9", 204), (f"limit={'9' * 5000}", 400), (f"offset={'9' * 5000}", 400)],
)
def test_searches_without_a_result_have_no_body_and_absurd_numbers_are_refused(query, status, node_server):
    errors = [line for line in node_server.lines if "internal error" in line]
    response, _, body = node_server.get(f"/dicomweb/instances?{query}")
    assert (response, body == b"") == (status, status == 204)
    time.sleep(0.2)
    assert [line for line in node_server.lines if "internal error" in line] == errors


def test_a_body_of_too_many_parts_stores_none_of_them(node_server, tmp_path):
    write(tmp_path)
    first = min(tmp_path.iterdir()).read_bytes()
    parts = b"".join(b"--b\r\n\r\n" + part + b"\r\n" for part in (first, *[b"x"] * multipart.MAX_PARTS))
    kind = 'multipart/related; type="application/dicom"; boundary=b'
    assert node_server.post("/dicomweb/studies", parts + b"--b--", Content_Type=kind)[0] == 413
    assert node_server.get("/dicomweb/instances")[0] == 204


def test_a_pdu_of_gigabytes_is_not_read(node_server):
    before = node_server.resident_mb()
    with socket.create_connection(("127.0.0.1", node_server.dicom_port), timeout=30) as peer:
        peer.sendall(struct.pack(">BxI", 1, 2**31))
        with suppress(OSError):  # the node closes the connection
            for _ in range(200):
                peer.sendall(bytes(1 << 20))
    assert node_server.resident_mb() - before < 50


def test_missing_spool_gives_503_and_the_server_still_stops_cleanly(bundle, inputs, tmp_path):
    with running_server([bundle], tmp_path / "spool", *QUICK) as server:
        assert server.get("/v2/health/ready")[0] == 200
        shutil.rmtree(tmp_path / "spool")
        status, _, body = server.post("/v1/segment", (inputs / "image0.png").read_bytes())
        assert (status, b"the spool cannot be used" in body) == (503, True)
        assert server.get("/v2/health/ready")[0] == 503
        assert server.terminate() == 0
        assert not any("Traceback" in line for line in server.lines)
