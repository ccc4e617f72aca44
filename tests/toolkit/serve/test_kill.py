"""kill -9 at random instants: everything that was acknowledged is segmented and sent, with one content per UID."""

import random
import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
from archives import recording_archive, send
from dicoms import AXIAL, save_series
from server_process import start_server

from medseg_trt.serve.spool import DATABASE

ROOT = "1.2.826.0.1.3680043.8.498.5"
SLICES = 4
KILLS = 5
LATEST_S = 2.5  # after the first slice: receiving, waiting, segmenting and sending take about two seconds
FINISH_S = 60.0  # after the last kill, and as long again for every ten series


def write_series(folder: Path, number: int) -> list[Path]:
    import numpy as np

    pixels = np.random.default_rng(number).integers(0, 255, (SLICES, 36, 28)).astype(np.int16)
    labelled = {"StudyInstanceUID": f"{ROOT}.{number}", "FrameOfReferenceUID": f"{ROOT}.{number}.2"}
    save_series(folder, pixels, AXIAL, order=range(SLICES), SeriesInstanceUID=f"{ROOT}.{number}.1", **labelled)
    return sorted(folder.iterdir())


def send_quietly(files: list[Path], port: int, accepted: set[Path]) -> None:
    """Send files one by one, as far as the server lives, and note those that it acknowledged."""
    for file in files:
        try:
            if send([file], port) == [0]:
                accepted.add(file)
        except (OSError, RuntimeError, AttributeError, ValueError):
            return


def run_kills(bundle: Path, folder: Path, kills: int, seed: int) -> None:
    """Kill a server ``kills`` times while it works, restart it, and check what the archive has at the end."""
    delays = random.Random(seed)
    options = ("--dicom-port", "0", "--quiet-s", "0.2", "--retry-s", "0.2")
    with recording_archive() as archive:
        server = start_server([bundle], folder / "spool", *options, "--send-to", archive.destination)
        for number in range(kills):
            files, accepted = write_series(folder / f"series{number}", number), set[Path]()
            sender = threading.Thread(target=send_quietly, args=(files, server.dicom_port, accepted))
            sender.start()
            time.sleep(delays.uniform(0, LATEST_S))
            server.kill()
            sender.join()
            server = start_server([bundle], folder / "spool", *options, "--send-to", archive.destination)
            send_quietly([file for file in files if file not in accepted], server.dicom_port, accepted)
            assert len(accepted) == SLICES
        ended = time.monotonic()
        while missing := {f"{ROOT}.{number}" for number in range(kills)} - complete_studies(archive):
            assert time.monotonic() - ended < FINISH_S * (1 + kills // 10), (
                f"lost: {missing}; {state_of(folder / 'spool')}"
            )
            time.sleep(0.2)
        print(f"{kills} kills; all sent {time.monotonic() - ended:.1f} s after the last one")
        assert server.terminate() == 0
    assert {uid: len(set(digests)) for uid, digests in archive.digests.items() if len(set(digests)) > 1} == {}


def state_of(spool: Path) -> dict[str, list[tuple[str, int]]]:
    """Return how many jobs and transfers are in each state."""
    with closing(sqlite3.connect(spool / DATABASE)) as database:
        return {
            table: database.execute(f"SELECT state, COUNT(*) FROM {table} GROUP BY state").fetchall()
            for table in ("jobs", "sends")
        }


def complete_studies(archive) -> set[str]:
    return {
        str(made.StudyInstanceUID)
        for made in list(archive.objects)
        if len(made.ReferencedSeriesSequence[0].ReferencedInstanceSequence) == SLICES
    }


def test_killed_server_loses_no_series_and_sends_one_content_per_uid(bundle, tmp_path):
    run_kills(bundle, tmp_path, KILLS, seed=0)


def test_http_job_is_finished_after_a_server_kill(bundle, inputs, masks, tmp_path):
    server = start_server([bundle], tmp_path / "spool")
    addresses = []
    for _ in range(3):
        status, headers, _ = server.post("/v1/segment", (inputs / "volume.nii.gz").read_bytes())
        assert status == 202
        addresses.append(headers["location"])
    server.kill()
    server = start_server([bundle], tmp_path / "spool")
    for address in addresses:
        job = server.wait_for_job(address)
        assert job["state"] == "done", job
        assert server.get(f"{address}/result")[2] == (masks / "volume.nii.gz").read_bytes()
    server.terminate()


@pytest.mark.slow
def test_fifty_server_kills_lose_no_series(bundle, tmp_path):
    run_kills(bundle, tmp_path, 50, seed=1)
