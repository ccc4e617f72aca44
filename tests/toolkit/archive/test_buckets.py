"""Inputs and masks in buckets: a folder stands in for one, and with ``-m slow`` moto's server is one."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from archive_runs import content, save_picture, save_slices, segment_tree, slices
from buckets import Bucket, FolderBucket, moto_server
from click.testing import CliRunner, Result

from medseg_trt.archive.object_store import ObjectFolder
from medseg_trt.cli import cli
from medseg_trt.errors import InputError, UsageError

MOTO = pytest.param("moto", marks=[pytest.mark.slow, pytest.mark.network])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    with moto_server(tmp_path_factory) as bucket:
        yield bucket


@pytest.fixture(params=["folder", MOTO])
def bucket(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    if request.param == "moto":
        return request.getfixturevalue("server")
    stand_in = FolderBucket(tmp_path / "objects")
    stand_in.stand_in(monkeypatch)
    return stand_in


def write_images(root: Path) -> Path:
    """Write pictures, a series, a file that is no image, and one that is damaged."""
    for seed, name in enumerate(("a.png", "p 1/b#.png", "p 1/c.png", "q/r/d.png")):
        save_picture(root / name, seed)
    (root / "q" / "ct").mkdir()
    save_slices([root / "q" / "ct" / str(number) for number in range(3)], slices(1))
    (root / "notes.txt").write_text("no image")
    (root / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n cut short")
    return root


def put_all(bucket: Bucket, folder: Path, prefix: str) -> None:
    for name, data in content(folder).items():
        bucket.put(f"{prefix}/{name}", data)


def infer(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["infer", *map(str, arguments), "--backend", "onnxruntime", "--threads", "1"])


def masks_and_records(files: dict[str, bytes]) -> dict[str, bytes]:
    """Return all files but the table whose paths say where the inputs were."""
    return {name: data for name, data in files.items() if name != "skipped.csv" and not name.endswith(".lock")}


def test_a_bucket_gives_the_bytes_of_a_local_run(bucket, tiny_bundle, tmp_path):
    images = write_images(tmp_path / "in")
    put_all(bucket, images, "one/in")
    segment_tree([images], tiny_bundle, tmp_path / "local", overlay=True, on_error=lambda *_: None)
    done = infer("s3://bucket/one/in", "-o", "s3://bucket/one/in/masks", "--overlay", "--bundle", tiny_bundle, "--json")
    result = json.loads(done.stdout)
    assert (done.exit_code, result["masks"], result["left_out"]) == (1, 5, 1)
    assert [*result["failed"]] == ["s3:/bucket/one/in/bad.png"]
    assert result["areas"] == "s3://bucket/one/in/masks/areas.csv"
    made = bucket.content("one/in/masks")
    assert masks_and_records(made) == masks_and_records(content(tmp_path / "local", records=True))
    skipped = made["skipped.csv"].replace(b"s3:/bucket/one/in", str(images).encode())
    assert skipped == (tmp_path / "local" / "skipped.csv").read_bytes()
    again = infer("s3://bucket/one/in", "-o", "s3://bucket/one/in/masks", "--bundle", tiny_bundle, "--json")
    assert json.loads(again.stdout)["masks"] == 5  # the masks in the bucket are no inputs


def test_masks_in_a_bucket_are_kept_unless_they_have_changed(bucket, tiny_bundle, tmp_path):
    images = write_images(tmp_path / "in")
    arguments = (images, "--tree", "-o", "s3://bucket/two/masks", "--bundle", tiny_bundle, "--json", "--continue")
    assert json.loads(infer(*arguments).stdout)["kept"] == 0
    first = bucket.content("two/masks")
    assert json.loads(infer(*arguments).stdout)["kept"] == 5
    bucket.delete("two/masks/a.png")
    bucket.put("two/masks/p 1/c.png", b"changed")
    bucket.put("two/masks/.finished/q/r/d.json", b"{}")
    assert json.loads(infer(*arguments).stdout)["kept"] == 2
    assert bucket.content("two/masks") == first


@pytest.mark.slow
@pytest.mark.network
def test_a_name_that_no_object_can_have_stops_one_image_alone(server, tiny_bundle, tmp_path):
    save_picture(tmp_path / "in" / "a.png")
    deep = Path(*["d" * 200] * 6, "b.png")
    save_picture(tmp_path / "in" / deep)
    done = infer(tmp_path / "in", "--tree", "-o", "s3://bucket/three", "--bundle", tiny_bundle, "--json")
    result = json.loads(done.stdout)
    assert result["masks"] == 1
    assert "a bucket has names of 1024 bytes; rename it" in result["failed"][str(tmp_path / "in" / deep)]


def test_what_a_bucket_cannot_do_is_refused(bucket, tiny_bundle, tmp_path):
    save_picture(tmp_path / "in" / "a.png")
    fixed = ("--bundle", tiny_bundle)
    for arguments, kind, words in (
        ((tmp_path / "in", "-o", "s3://bucket/out"), UsageError, "give --tree too, or a folder instead of s3://bucket"),
        ((tmp_path / "in", "--part", "1/2", "-o", "s3://bucket/out"), UsageError, "parts are joined in a folder alone"),
        ((tmp_path / "in", "--join", "-o", "s3://bucket/out"), UsageError, "parts are joined in a folder alone"),
        (("s3://bucket/nothing", "-o", tmp_path / "out"), InputError, "no image that can be used"),
        (("s3://bucket/out/in", "-o", "s3://bucket/out"), InputError, "no image that can be used"),
    ):
        done = infer(*arguments, *fixed)
        assert isinstance(done.exception, kind)
        assert words in str(done.exception)


@pytest.mark.slow
@pytest.mark.network
def test_a_server_s_reasons_are_given(server, tiny_bundle, tmp_path):
    save_picture(tmp_path / "in" / "a.png")
    done = infer(tmp_path / "in", "--tree", "-o", "s3://no-such-bucket/out", "--bundle", tiny_bundle)
    assert "s3://no-such-bucket/out/" in str(done.exception)
    assert "cannot be written" in str(done.exception)
    assert "NO_SUCH_BUCKET" in str(done.exception)
    done = infer("s3://no-such-bucket/in", "-o", tmp_path / "out", "--bundle", tiny_bundle)
    assert "holds no objects, or there is no such bucket" in (tmp_path / "out" / "skipped.csv").read_text()
    with pytest.raises(InputError, match="'UPPER' is no name of a bucket"):
        ObjectFolder(Path("s3:/UPPER/x"))
