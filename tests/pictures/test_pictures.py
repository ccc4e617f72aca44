"""The committed pictures show the code as it is, and a picture that no longer does is noticed."""

from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from pictures import layers, route
from pictures.__main__ import PICTURES
from pictures.layers import Layers, read_layers
from pictures.modules import ROOT, read_modules

STALE = "the picture is out of date: make pictures"


def elements(svg: str, attribute: str) -> list[dict[str, str]]:
    """Find the attributes of every element that has this one."""
    return [dict(node.attrib) for node in ElementTree.fromstring(svg).iter() if attribute in node.attrib]


def drawn_edges(svg: str) -> set[tuple[str, str]]:
    return {(arrow["data-from"], arrow["data-to"]) for arrow in elements(svg, "data-from")}


def drawn_files(svg: str) -> dict[str, str]:
    return {step["data-function"]: step["data-file"] for step in elements(svg, "data-function")}


def write_tree(root: Path, **sources: str) -> Path:
    """Write modules; a dot in a name is a folder, as in ``toolkit.imaging.images``."""
    for package in ("toolkit", "export", "train", "kernels"):
        (root / package).mkdir()
    for name, source in sources.items():
        path = root / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return root


TREE = {
    "toolkit.cli": "from medseg_trt.pipeline import infer",
    "toolkit.pipeline": "def infer():\n    from medseg_trt.sessions.open import open_session",
    "toolkit.sessions.open": "from medseg_trt.imaging.images import Image\nimport medseg_trt.spec",
    "toolkit.imaging.images": "READERS = {'.nii': 'medseg_trt.imaging.formats.nifti'}",
    "toolkit.imaging.formats.nifti": "from medseg_trt.errors import InputError",
    "toolkit.spec": "from medseg_trt.errors import UsageError",
    "toolkit.errors": "",
    "train.loop": "from medseg_trt.imaging import images\nfrom medseg_trt import __version__",
}


def test_the_committed_picture_of_the_layers_shows_the_imports_of_the_code():
    svg = (ROOT / "toolkit" / "layers.svg").read_text(encoding="utf-8")
    layers = read_layers(read_modules())
    assert drawn_edges(svg) == layers.edges, STALE
    assert {box["data-box"] for box in elements(svg, "data-box")} == set(layers.members), STALE
    text = " ".join(ElementTree.fromstring(svg).itertext())
    assert all(name in text for names in layers.members.values() for name in names), STALE


def test_the_committed_picture_of_the_way_names_the_files_of_the_code():
    modules = read_modules()
    expected = {step.function: route.locate(step.function, modules) for step in (*route.SETUP, *route.STEPS)}
    assert drawn_files((ROOT / "toolkit" / "route.svg").read_text(encoding="utf-8")) == expected, STALE
    assert drawn_files(route.make(ROOT)) == expected  # the steps are reached from infer, or this would exit


def test_every_picture_stands_in_a_readme():
    readme = (ROOT / "toolkit" / "README.md").read_text(encoding="utf-8")
    assert [Path(name).name for name in PICTURES if f"]({Path(name).name})" not in readme] == []


def test_the_layers_are_read_from_imports_of_every_kind(tmp_path):
    assert read_layers(read_modules(write_tree(tmp_path, **TREE))) == Layers(
        members={
            "base": ("errors", "spec"),
            "cli.py": ("cli.py",),
            "imaging": ("imaging",),
            "pipeline.py": ("pipeline.py",),
            "sessions": ("sessions",),
            "train": ("train",),
        },
        edges=frozenset(
            {
                ("cli.py", "pipeline.py"),
                ("imaging", "base"),
                ("pipeline.py", "sessions"),
                ("sessions", "imaging"),  # sessions -> base follows from this and imaging -> base
                ("train", "imaging"),
            }
        ),
    )


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("toolkit.imaging.images", "import medseg_trt.train.loop"),
        ("toolkit.imaging.images", "HOMES = ['medseg_trt.sessions.open']"),  # a circle
        ("toolkit.imaging.images", "HOMES = ['medseg_trt.sessions.open:open_session']"),
        ("kernels.rmsnorm", "from medseg_trt.errors import UsageError"),
        ("toolkit.spec", "from medseg_trt import imaging\nfrom medseg_trt.imaging import images"),
    ],
)
def test_another_import_changes_the_picture(tmp_path, module, source):
    before = layers.make(write_tree(tmp_path, **TREE))
    (tmp_path / f"{module.replace('.', '/')}.py").write_text(source, encoding="utf-8")
    assert drawn_edges(layers.make(tmp_path)) != drawn_edges(before)


def test_boxes_of_a_row_do_not_overlap_and_every_arrow_points_down():
    svg = layers.make(ROOT)
    rows: dict[str, list[tuple[float, float]]] = {}
    for box in elements(svg, "data-box"):
        rows.setdefault(box["y"], []).append((float(box["x"]), float(box["x"]) + float(box["width"])))
    for spans in map(sorted, rows.values()):
        assert all(right < left for (_, right), (left, _) in pairwise(spans))
    tops = {box["data-box"]: float(box["y"]) for box in elements(svg, "data-box")}
    assert [edge for edge in drawn_edges(svg) if tops[edge[0]] >= tops[edge[1]]] == []


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ({"toolkit.pipeline": "def infer():\n    pass"}, "load_bundle is defined in no file"),
        (
            {"toolkit.a": "def load_bundle():\n    pass", "toolkit.b": "def load_bundle():\n    pass"},
            r"load_bundle is defined in \['toolkit/a.py', 'toolkit/b.py'\]",
        ),
        ({"toolkit.a": "def load_bundle():\n    pass"}, "infer does not reach load_bundle"),
    ],
)
def test_a_step_that_the_code_does_not_take_is_named(tmp_path, sources, words):
    with pytest.raises(SystemExit, match=words):
        route.make(write_tree(tmp_path, **sources))
