"""The DICOM node: real parts send and receive, and what cannot be used gets a status and a line of the log."""

import json
import shutil
import socket
import subprocess
import time
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pynetdicom
import pytest
from archives import recording_archive, running_orthanc, send, store_bytes
from dicoms import AXIAL, save_series
from mask_positions import labels_at
from pydicom.uid import UID
from repaired_series import repair
from server_process import ServerProcess, running_server

from medseg_trt.inference.to_folder import MaskFolder
from medseg_trt.pipeline import infer
from medseg_trt.serve.dicom_node import MAX_ASSOCIATIONS

ROOT = "1.2.826.0.1.3680043.8.498"
VERIFICATION = UID("1.2.840.10008.1.1")
# On a busy machine a longer pause can fall between two slices; the end of an association ends a series at once.
QUICK = ("--dicom-port", "0", "--quiet-s", "5", "--retry-s", "0.3")
needs_dcmtk = pytest.mark.skipif(shutil.which("storescu") is None, reason="needs storescu (Debian package dcmtk)")


def series(folder: Path, number: int, slices: int = 4, first: int = 0) -> list[Path]:
    """Write a small series with UIDs of its own, or the rest of it from slice ``first`` on."""
    pixels = np.random.default_rng(number).integers(0, 255, (slices, 36, 28)).astype(np.int16)
    save_series(
        folder,
        pixels,
        AXIAL,
        order=range(slices),
        StudyInstanceUID=f"{ROOT}.{number}",
        SeriesInstanceUID=f"{ROOT}.{number}.1",
        FrameOfReferenceUID=f"{ROOT}.{number}.2",
    )
    return sorted(folder.iterdir())[first:]


def wait_for_log(server: ServerProcess, text: str, timeout_s: float = 60.0) -> str:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for line in server.lines:
            if text in line:
                return line
        time.sleep(0.05)
    raise AssertionError(f"{text!r} is not in the log: {server.lines[-10:]}")


@pytest.fixture(scope="module")
def node(bundle, archive, tmp_path_factory):
    folder = tmp_path_factory.mktemp("node")
    options = ("--allow-ae", "TESTS,STORESCU", "--send-to", archive.destination, "--dicom-output", str(folder / "out"))
    with running_server([bundle], folder / "spool", *QUICK, *options) as server:
        yield server


@needs_dcmtk
def test_a_real_series_goes_through_orthanc(bundle, organs, tmp_path):
    files = repair(organs / "dicom" / "ct_B", tmp_path / "ct")
    written = MaskFolder(tmp_path / "masks")
    list(infer([tmp_path / "ct"], bundle, backend="onnxruntime", threads=1, destination=written))
    coded = MaskFolder(tmp_path / "coded", mask_format="dicom-seg")
    list(infer([tmp_path / "ct"], bundle, backend="onnxruntime", threads=1, destination=coded))
    with (
        running_orthanc(tmp_path / "orthanc") as orthanc,
        running_server(
            [bundle],
            tmp_path / "spool",
            *QUICK,
            "--secondary-capture",
            "--dicom-output",
            str(tmp_path / "out"),
            "--send-to",
            f"{orthanc.title}@127.0.0.1:{orthanc.dicom_port}",
        ) as server,
    ):
        address = ["127.0.0.1", str(server.dicom_port)]
        subprocess.run(["echoscu", "-aec", "MEDSEG", *address], check=True, timeout=60)
        subprocess.run(["storescu", "-R", "-xv", "-aec", "MEDSEG", *address, *files], check=True, timeout=120)
        instances = orthanc.wait_for_instances(2)
        modality = {orthanc.json(f"/instances/{name}/simplified-tags")["Modality"]: name for name in instances}
        assert sorted(modality) == ["OT", "SEG"]
        (tmp_path / "seg.dcm").write_bytes(orthanc.get(f"/instances/{modality['SEG']}/file"))
    returned = highdicom.seg.segread(tmp_path / "seg.dcm")
    ours = pydicom.dcmread(coded.masks[0])
    assert returned.SOPInstanceUID == ours.SOPInstanceUID
    assert (tmp_path / "out" / f"{ours.SOPInstanceUID}.dcm").read_bytes() == coded.masks[0].read_bytes()
    is_labelled = False
    for file in files:
        dataset = pydicom.dcmread(file, stop_before_pixels=True)
        (labels,) = returned.get_pixels_by_source_instance(
            [dataset.SOPInstanceUID], combine_segments=True, assert_missing_frames_are_empty=True
        )
        np.testing.assert_array_equal(labels, labels_at(written.masks[0], dataset))
        is_labelled |= bool(labels.any())
    assert is_labelled, "an empty mask would show nothing"


def test_two_series_in_one_association_give_two_segmentations(node, archive, tmp_path):
    before = len(archive.digests)
    assert send([*series(tmp_path / "a", 11), *series(tmp_path / "b", 12)], node.dicom_port) == [0] * 8
    objects = archive.wait_for(before + 2)[-2:]
    assert {str(made.StudyInstanceUID) for made in objects} == {f"{ROOT}.11", f"{ROOT}.12"}
    assert all(made.Modality == "SEG" for made in objects)


def test_the_same_series_again_is_accepted_and_made_once(node, archive, tmp_path):
    before = len(archive.digests)
    files = series(tmp_path / "a", 13)
    assert send(files, node.dicom_port) == [0] * 4
    archive.wait_for(before + 1)
    assert send(files, node.dicom_port) == [0] * 4
    time.sleep(1.0)
    assert len(archive.digests) == before + 1
    assert all(len(digests) == 1 for digests in archive.digests.values())


def test_slices_that_come_later_make_a_segmentation_of_the_whole_series(node, archive, tmp_path):
    before = len(archive.digests)
    files = series(tmp_path / "a", 14, slices=5)
    send(files[:3], node.dicom_port)
    first = archive.wait_for(before + 1)[-1]
    send(files[3:], node.dicom_port)
    second = archive.wait_for(before + 2)[-1]
    assert first.SOPInstanceUID != second.SOPInstanceUID
    assert len(second.ReferencedSeriesSequence[0].ReferencedInstanceSequence) == 5


def test_a_missing_slice_is_named_and_the_next_series_is_segmented(node, archive, tmp_path):
    before = len(archive.digests)
    files = series(tmp_path / "a", 15, slices=6)
    assert send([*files[:2], *files[3:]], node.dicom_port) == [0] * 5
    line = json.loads(wait_for_log(node, "slice(s) may be missing"))
    assert line["level"] == "warning"
    send(series(tmp_path / "b", 16), node.dicom_port)
    archive.wait_for(before + 1)


def test_unknown_titles_are_rejected(node, tmp_path):
    files = series(tmp_path / "a", 17)
    assert send(files, node.dicom_port, calling="STRANGER") == []
    assert send(files, node.dicom_port, called="OTHER") == []
    wait_for_log(node, "an association was rejected")
    assert send(files, node.dicom_port) == [0] * 4


def test_objects_without_uids_get_a_failure_and_a_line(node, organs):
    path = sorted((organs / "dicom" / "ct_B").iterdir())[0]
    meta = pydicom.dcmread(path, stop_before_pixels=True).file_meta
    content = path.read_bytes()
    length = 128 + 4 + 12 + meta.FileMetaInformationGroupLength
    uid = meta.MediaStorageSOPInstanceUID
    status = store_bytes(node.dicom_port, content[length:], meta.MediaStorageSOPClassUID, uid, meta.TransferSyntaxUID)
    assert status == 0xA900
    line = json.loads(wait_for_log(node, "0xA900"))
    assert "no valid" in line["message"]


@pytest.mark.parametrize("content", [b"", bytes(6), b"GET / HTTP/1.1\r\n\r\n"])
def test_connections_that_ask_for_no_association_take_no_place(content, node, tmp_path):
    """Of a port scanner or a health check: more of them than associations are possible."""
    for _ in range(MAX_ASSOCIATIONS + 4):
        with socket.create_connection(("127.0.0.1", node.dicom_port), timeout=60) as client:
            client.sendall(content)
            client.shutdown(socket.SHUT_WR)
            while client.recv(100):
                pass
    assert send(series(tmp_path / "a", 21), node.dicom_port) == [0] * 4


def test_an_association_too_many_is_rejected_and_the_log_says_why(node):
    entity = pynetdicom.AE(ae_title="TESTS")
    entity.add_requested_context(VERIFICATION)
    opened = [entity.associate("127.0.0.1", node.dicom_port, ae_title="MEDSEG") for _ in range(MAX_ASSOCIATIONS + 1)]
    assert [association.is_established for association in opened] == [True] * MAX_ASSOCIATIONS + [False]
    wait_for_log(node, f"an association was rejected: {MAX_ASSOCIATIONS} are open")
    for association in opened[:-1]:
        association.release()


@pytest.mark.parametrize("encoded", [b"", b"nonsense" * 100, bytes(2000)])
def test_objects_that_are_none_get_a_failure(encoded, node):
    status = store_bytes(
        node.dicom_port, encoded or b"\0\0", "1.2.840.10008.5.1.4.1.1.2", "1.2.3", "1.2.840.10008.1.2.1"
    )
    assert status & 0xF000 in (0xA000, 0xC000)


def test_an_object_with_a_known_uid_and_other_pixels_is_refused(node, tmp_path):
    files = series(tmp_path / "a", 18)
    assert send(files, node.dicom_port) == [0] * 4
    dataset = pydicom.dcmread(files[0])
    dataset.PixelData = bytes(len(dataset.PixelData))
    dataset.save_as(files[0])
    assert send(files[:1], node.dicom_port) == [0xC000]


def test_a_destination_that_is_down_is_tried_again_and_holds_up_no_other(bundle, tmp_path):
    with recording_archive("UP") as up, recording_archive("DOWN") as down:
        down.stop()
        options = ("--send-to", up.destination, "--send-to", down.destination)
        with running_server([bundle], tmp_path / "spool", *QUICK, *options) as server:
            send(series(tmp_path / "a", 19), server.dicom_port)
            up.wait_for(1)
            wait_for_log(server, "could not be sent")
            send(series(tmp_path / "b", 20), server.dicom_port)
            up.wait_for(2)
            assert not down.digests
            down.start()
            down.wait_for(2)
        assert down.digests == up.digests


def test_no_name_of_a_patient_is_in_the_log(node):
    text = "\n".join(node.lines)
    assert "refused" in text
    assert "Doe" not in text
    assert "4711" not in text
