"""A bucket for tests: a folder that stands in for one, or moto's server, in an environment of its own."""

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from once import made_once

from medseg_trt.archive.object_store import StoredObject
from medseg_trt.errors import InputError

MOTO = "moto[server]==5.2.5"  # its dependencies do not install beside the constraints
NAME = "bucket"


class FolderBucket:
    """A folder that stands in for a bucket."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def put(self, name: str, content: bytes) -> None:
        path = self.root / NAME / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def delete(self, name: str) -> None:
        (self.root / NAME / name).unlink()

    def content(self, prefix: str) -> dict[str, bytes]:
        top = self.root / NAME / prefix
        return {path.relative_to(top).as_posix(): path.read_bytes() for path in top.rglob("*") if path.is_file()}

    def stand_in(self, patch: pytest.MonkeyPatch) -> None:
        """Let medseg-trt use the folder."""
        root = self.root

        class Objects:
            def __init__(self, path: Path) -> None:
                self._top = root.joinpath(*path.parts[1:])

            def objects(self) -> Iterator[StoredObject]:
                files = [path for path in self._top.rglob("*") if path.is_file()]
                if not files:
                    raise InputError("holds no objects")
                for path in files:
                    status = path.stat()
                    name = path.relative_to(self._top).as_posix()
                    yield StoredObject(name=name, size=status.st_size, mtime_ns=status.st_mtime_ns)

            def open(self, name: str) -> Any:
                return (self._top / name).open("rb")

            def fetch(self, name: str, target: Path) -> bool:
                target.parent.mkdir(parents=True, exist_ok=True)
                is_there = (self._top / name).exists()
                if is_there:
                    target.write_bytes((self._top / name).read_bytes())
                return is_there

            def send(self, source: Path, name: str) -> None:
                FolderBucket(root).put((self._top / name).relative_to(root / NAME).as_posix(), source.read_bytes())

            def close(self) -> None:
                pass

        for module in ("containers", "object_store"):
            patch.setattr(f"medseg_trt.archive.{module}.ObjectFolder", Objects)


class S3Bucket:
    """A bucket of a server."""

    def __init__(self) -> None:
        from pyarrow import fs  # pyright: ignore[reportMissingImports]  # an extra of its own

        self._fs = fs
        self._store, _ = fs.FileSystem.from_uri(f"s3://{NAME}?allow_bucket_creation=true")
        self._store.create_dir(NAME)

    def put(self, name: str, content: bytes) -> None:
        with self._store.open_output_stream(f"{NAME}/{name}") as file:
            file.write(content)

    def delete(self, name: str) -> None:
        self._store.delete_file(f"{NAME}/{name}")

    def content(self, prefix: str) -> dict[str, bytes]:
        found = self._store.get_file_info(self._fs.FileSelector(f"{NAME}/{prefix}", recursive=True))
        files = [item.path for item in found if item.type == self._fs.FileType.File]
        return {path.removeprefix(f"{NAME}/{prefix}/"): self._store.open_input_stream(path).read() for path in files}


Bucket = FolderBucket | S3Bucket


def _install_moto(folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", folder], check=True, timeout=300)
    subprocess.run([folder / "bin" / "pip", "install", "-q", MOTO], check=True, timeout=1800)


@contextmanager
def moto_server(factory: pytest.TempPathFactory) -> Generator[S3Bucket, None, None]:
    """Start moto's server in an environment of its own, and let pyarrow find it."""
    pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install 'medseg-trt[s3]'")
    programs = made_once(factory, "moto", _install_moto) / "bin"
    with pytest.MonkeyPatch.context() as patch:
        yield from _served(programs, patch)


def _served(programs: Path, patch: pytest.MonkeyPatch) -> Iterator[S3Bucket]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    further = {"AWS_ENDPOINT_URL": address, "AWS_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
    for name, value in (dict.fromkeys(keys, "test") | further).items():
        patch.setenv(name, value)
    command = [programs / "moto_server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(f"{address}/moto-api/", server)
        yield S3Bucket()
    finally:
        server.terminate()
        server.wait(30)


def _wait_for(address: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
        assert server.poll() is None
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"{address} does not answer")
