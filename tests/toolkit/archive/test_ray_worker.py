"""What runs on the nodes of a cluster, without a cluster."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from archive_runs import content, plan_of, save_picture, segment_tree

from medseg_trt import __version__
from medseg_trt.archive.fed_sources import FedSources
from medseg_trt.archive.mask_tree import MaskTree
from medseg_trt.archive.parts import PartRefused
from medseg_trt.archive.ray_run import _blocks
from medseg_trt.archive.ray_worker import BlockResult, RayJob, Segmenter
from medseg_trt.archive.request import ArchiveRequest
from medseg_trt.bundles.bundle import load_bundle
from medseg_trt.errors import ArtefactError, DeviceError
from medseg_trt.imaging.images import Source


def job(bundle: Path, output: Path) -> RayJob:
    return RayJob(
        version=__version__,
        bundle=str(bundle),
        manifest_sha256=load_bundle(bundle).manifest_sha256,
        output=str(output),
        overlay=False,
        mask_format="auto",
        containers=(),
        options={"backend": "onnxruntime", "threads": 1},
    )


def test_blocks_make_the_bytes_of_a_local_run(tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr("medseg_trt.archive.ray_run.BLOCK", 2)
    for seed, name in enumerate(("a.png", "p/b.png", "p/c.png", "q/r/d.png")):
        save_picture(tmp_path / "in" / name, seed)
    (tmp_path / "in" / "p" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n cut short")
    segment_tree([tmp_path / "in"], tiny_bundle, tmp_path / "local", on_error=lambda *_: None)

    out = tmp_path / "out"
    tree = MaskTree(out, ArchiveRequest(), on_error=lambda *_: None)
    tree.find_sources([tmp_path / "in"], load_bundle(tiny_bundle))
    blocks = [*_blocks(tree.plan)]
    assert len(blocks) == 3
    with closing(Segmenter(job(tiny_bundle, out))) as segmenter:
        results = [
            BlockResult.parse(text)
            for block in [*blocks, blocks[0]]  # as after the loss of an actor, whose block is repeated
            for text in segmenter({"sources": np.array([block], object)})["result"]
        ]
    assert [(result.masks, result.kept) for result in results] == [(2, 0), (1, 0), (1, 0), (2, 2)]
    refused = [
        PartRefused(position=tree.plan.named(stem)[0], file=str(tree.plan.named(stem)[1].path), reason=reason)
        for result in results
        for stem, reason in result.refused
    ]
    assert tree.join_records(refused, results[0].made_by) == []
    tree.plan.close()
    assert content(out) == content(tmp_path / "local")


def test_a_node_of_another_version_or_with_another_bundle_is_named(tiny_bundle, tmp_path):
    good = job(tiny_bundle, tmp_path)
    with pytest.raises(DeviceError, match=rf"a node has medseg-trt {__version__} and the driver 9\.9; install one"):
        Segmenter(replace(good, version="9.9"))
    with pytest.raises(ArtefactError, match="on a node is not the driver's bundle; copy it there"):
        Segmenter(replace(good, manifest_sha256="0" * 64))


def test_an_error_of_all_images_ends_the_block(tiny_bundle, tmp_path):
    save_picture(tmp_path / "in" / "a.png")
    plan = plan_of([tmp_path / "in"], tmp_path / "out")
    segmenter = Segmenter(replace(job(tiny_bundle, tmp_path / "out"), options={"backend": "none"}))
    with pytest.raises(Exception, match="none"):
        segmenter({"sources": np.array([*_blocks(plan)], object)})
    plan.close()


def test_every_iterator_gets_all_images_that_are_fed():
    sources = [
        Source(path=Path(f"{number}.png"), files=(Path(f"{number}.png"),), stem=str(number)) for number in range(9)
    ]
    fed, seen = FedSources(), [list[Source](), list[Source]()]
    threads = [Thread(target=lambda got=got: got.extend(fed)) for got in seen]
    for thread in threads:
        thread.start()
    for start in (0, 3, 6):
        fed.feed(sources[start : start + 3])
    fed.close()
    for thread in threads:
        thread.join(10)
    assert seen == [sources, sources]
