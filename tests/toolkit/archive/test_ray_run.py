"""Runs on a cluster of two nodes that are simulated on this machine; Ray is in an extra of its own."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from archive_runs import content, save_picture, segment_tree
from buckets import Bucket, moto_server

from medseg_trt import __version__
from medseg_trt.archive import ray_run
from medseg_trt.archive.mask_tree import MaskTree
from medseg_trt.archive.request import ArchiveRequest
from medseg_trt.bundles.bundle import load_bundle
from medseg_trt.errors import DeviceError
from medseg_trt.files import PARTIAL

pytest.importorskip("ray", reason="Ray is not installed: pip install 'medseg-trt[ray]'")
pytestmark = [
    pytest.mark.slow,  # a cluster takes half a minute to start
    pytest.mark.filterwarnings("ignore"),  # Ray's own
]
OPTIONS = {"backend": "onnxruntime", "threads": 1}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    with moto_server(tmp_path_factory) as bucket:
        yield bucket


@pytest.fixture
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster  # pyright: ignore[reportMissingImports]  # an extra of its own

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    yield nodes
    nodes.shutdown()


def write_images(root: Path, count: int) -> Path:
    for number in range(count):
        save_picture(root / f"p{number % 7}" / f"{number}.png", number)
    (root / "p0" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n cut short")
    return root


def run(inputs: Path, bundle: Path, output: Path, address: str) -> MaskTree:
    tree = MaskTree(output, ArchiveRequest(), on_error=lambda *_: None)
    ray_run.run_on_ray(tree, [inputs], load_bundle(bundle), address, OPTIONS)
    return tree


def test_a_cluster_gives_the_bytes_of_a_local_run_also_when_a_worker_and_a_node_are_lost(
    tiny_bundle, tmp_path, cluster, monkeypatch
):
    import psutil

    monkeypatch.setattr(ray_run, "BLOCK", 8)
    images = write_images(tmp_path / "in", 400)
    segment_tree([images], tiny_bundle, tmp_path / "local", on_error=lambda *_: None)
    node = cluster.add_node(num_cpus=2)
    out, ended = tmp_path / "out", list[MaskTree]()
    left = out / "p0" / f"{PARTIAL}0.png"  # of a worker that died while it wrote, as this test's own may
    left.parent.mkdir(parents=True)
    left.write_bytes(b"cut short")
    running = threading.Thread(target=lambda: ended.append(run(images, tiny_bundle, out, cluster.address)))
    running.start()
    deadline = time.monotonic() + 240
    killed = lost = False
    while running.is_alive() and time.monotonic() < deadline:
        done = sum(1 for _ in (out / ".finished").rglob("*.json"))
        if not killed and done >= 20:
            workers = [
                process
                for process in psutil.process_iter(["cmdline"])
                if "MapWorker" in " ".join(process.info["cmdline"] or [])
            ]
            workers[0].kill()
            killed = True
        if not lost and done >= 60:
            cluster.remove_node(node, allow_graceful=False)
            lost = True
        time.sleep(0.05)
    running.join(10)
    assert (killed, lost) == (True, True)
    assert ended[0].is_joined
    assert content(out, records=True) == content(tmp_path / "local", records=True)


@pytest.mark.network
def test_a_cluster_reads_from_a_bucket_and_writes_to_one(tiny_bundle, tmp_path, server, cluster, monkeypatch):
    monkeypatch.setattr(ray_run, "BLOCK", 4)
    images = write_images(tmp_path / "in", 20)
    segment_tree([images], tiny_bundle, tmp_path / "local", on_error=lambda *_: None)
    for name, data in content(images).items():
        server.put(f"in/{name}", data)
    assert run(Path("s3://bucket/in"), tiny_bundle, Path("s3://bucket/out"), cluster.address).num_masks == 20
    local, made = content(tmp_path / "local", records=True), server.content("out")
    made["skipped.csv"] = made["skipped.csv"].replace(b"s3:/bucket/in", str(images).encode())
    assert made == local
    assert run(Path("s3://bucket/in"), tiny_bundle, Path("s3://bucket/out"), cluster.address).kept == 20


def test_a_node_of_another_version_ends_the_run_with_the_reason(tiny_bundle, tmp_path, cluster, monkeypatch):
    monkeypatch.setattr(ray_run, "__version__", "9.9")
    images = write_images(tmp_path / "in", 1)
    with pytest.raises(DeviceError, match=rf"a node has medseg-trt {__version__} and the driver 9\.9"):
        run(images, tiny_bundle, tmp_path / "out", cluster.address)


def test_missing_ray_cluster_is_a_device_error(tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "2")
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "2")
    images = write_images(tmp_path / "in", 1)
    with pytest.raises(DeviceError, match="no Ray cluster of this version answers at auto"):
        run(images, tiny_bundle, tmp_path / "out", "auto")
