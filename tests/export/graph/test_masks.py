"""Graphs that make masks themselves, compared with ``preprocess.restore``, in every back-end."""

from importlib import import_module
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from medseg_trt.errors import UsageError
from medseg_trt.export.graph import masks
from medseg_trt.export.graph.masks import with_masks
from medseg_trt.export.graph.save import save_graphs
from medseg_trt.export.graph.trace import INPUT, OPSET, OUTPUT, OnnxGraph
from medseg_trt.imaging.preprocess import resampled_size, restore
from medseg_trt.sessions.backends import BACKENDS
from medseg_trt.sessions.base import Session
from medseg_trt.spec import Preprocessing

CPU_BACKENDS = [name for name, backend in BACKENDS.items() if not backend.gpu]
SIZE = (32, 48)
STRETCHED = Preprocessing(image_size=SIZE)
IMAGES = np.random.default_rng(0).normal(size=(3, 3, *SIZE)).astype(np.float32)
SPACED = Preprocessing(image_size=SIZE, spacing_mm=1.5)
SOURCE_SIZES = [SIZE, (75, 101), (13, 21), (64, 24), (1, 1)]  # the same, larger, smaller, one axis each way, one pixel

PLACES = [  # size and spacing: padded, cropped, one axis each way, odd and even room, no spacing, one pixel
    ((30, 41), (1.1, 0.7)),
    ((100, 120), (0.9, 1.3)),
    ((101, 31), (0.8, 1.0)),
    ((20, 200), (1.5, 0.75)),
    ((33, 49), (1.5, 1.5)),
    ((34, 47), (1.5, 1.5)),
    ((75, 101), None),
    ((1, 1), (1.5, 90.0)),
    ((41, 61), (3.0, 3.0)),  # centres of rows 12 and 28 and of columns 18 and 42 lie exactly on an edge
]
INTEGERS, INSIDE = masks._Placement._integers, masks._Placement._inside


def network(num_classes: int) -> OnnxGraph:
    """Return a graph whose logits are the first channels of the image."""
    batch = ir.SymbolicDim("batch")
    image = ir.Value(name=INPUT, shape=ir.Shape([batch, 3, *SIZE]), type=ir.TensorType(ir.DataType.FLOAT))
    logits = ir.Value(name=OUTPUT, shape=ir.Shape([batch, num_classes, *SIZE]), type=ir.TensorType(ir.DataType.FLOAT))
    bounds = [
        ir.val(name, const_value=ir.tensor(np.array([value]), name=name))
        for name, value in (("start", 0), ("end", num_classes), ("axis", 1))
    ]
    node = ir.node("Slice", [image, *bounds], outputs=[logits], name="slice")
    graph = ir.Graph([image], [logits], nodes=[node], initializers=bounds, opset_imports={"": OPSET}, name="network")
    return OnnxGraph(model=ir.Model(graph, ir_version=10))


def opened(graph: OnnxGraph, backend: str, folder: Path) -> Session:
    save_graphs({"graph.onnx": graph}, folder, "weights.bin")
    return import_module(BACKENDS[backend].module).open_graph(folder / "graph.onnx", "fp32", 1, "fp32")


def same_masks(session: Session, num_classes: int, preprocessing: Preprocessing, size, spacing) -> np.ndarray:
    """Return the session's masks, which must be those of ``restore``.

    The order of the additions differs, so a pixel may flip where two classes tie to 1e-6: none of these does.
    """
    expected = np.stack([restore(logits[:num_classes], size, preprocessing, spacing) for logits in IMAGES])
    masks = session.masks(IMAGES, size, resampled_size(size, preprocessing, spacing))
    assert (masks.dtype, masks.shape) == (np.uint8, (3, *size))
    np.testing.assert_array_equal(masks, expected)
    return masks


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("num_classes", [1, 3])
def test_masks_are_those_of_restore(tmp_path, backend, num_classes):
    with opened(with_masks(network(num_classes), STRETCHED), backend, tmp_path) as session:
        assert session.gives_masks
        np.testing.assert_array_equal(session.run(IMAGES), IMAGES[:, :num_classes])
        for size in SOURCE_SIZES:
            masks = same_masks(session, num_classes, STRETCHED, size, None)
            assert size == (1, 1) or len(np.unique(masks)) == max(num_classes, 2)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("num_classes", [1, 3])
def test_masks_of_padded_and_cropped_images_are_those_of_restore(tmp_path, backend, num_classes):
    with opened(with_masks(network(num_classes), SPACED), backend, tmp_path) as session:
        np.testing.assert_array_equal(session.run(IMAGES), IMAGES[:, :num_classes])
        for size, spacing in PLACES:
            same_masks(session, num_classes, SPACED, size, spacing)


def rounded_towards_zero(self, op_type: str, first: ir.Value, second: ir.Value) -> ir.Value:
    return INTEGERS(self, op_type, first, self.zero if op_type == "Sub" and "Mod" in str(second.name) else second)


def everywhere(self, axis: int) -> ir.Value:
    inside = INSIDE(self, axis)
    name = ("height", "width")[axis]
    outside = self.append("Not", [inside], ir.DataType.BOOL, [name])
    return self.append("Or", [inside, outside], ir.DataType.BOOL, [name])


class Replacing:
    """Appends other operators than it is asked for."""

    def __init__(self, append, operators) -> None:
        self.append, self.operators = append, operators

    def __call__(self, op_type, *arguments, **attributes):
        return self.append(self.operators.get(op_type, op_type), *arguments, **attributes)

    def __getattr__(self, name):
        return getattr(self.append, name)


def with_operator(asked: str, given: str):
    def inside(self, axis: int) -> ir.Value:
        append, self.append = self.append, Replacing(self.append, {asked: given})
        inside = INSIDE(self, axis)
        self.append = append
        return inside

    return inside


FAULTS = {
    "offset": ("_integers", rounded_towards_zero),
    "padding": ("uncropped", lambda _, logits: logits),
    "inside": ("_inside", everywhere),
    "far edge": ("_inside", with_operator("Less", "LessOrEqual")),
    "near edge": ("_inside", with_operator("GreaterOrEqual", "Greater")),
}


def test_a_centre_on_the_near_edge_is_inside_and_one_on_the_far_edge_is_not(tmp_path):
    # By hand: 41 rows of 3 mm are 82 of 1.5 mm; 25 of them are cropped before the 32, and row i has its centre at
    # 2 i + 1 - 25. 61 columns are 122, of which 37 are cropped before the 48: 2 i + 1 - 37.
    with opened(with_masks(network(3), SPACED), "onnxruntime", tmp_path) as session:
        everywhere_one = np.zeros((1, 3, *SIZE), np.float32)
        everywhere_one[:, 1] = 1
        (masks,) = session.masks(everywhere_one, (41, 61), (82, 122))
    rows, columns = np.flatnonzero(masks.any(axis=1)), np.flatnonzero(masks.any(axis=0))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (12, 27, 18, 41)
    assert masks.sum() == len(rows) * len(columns)


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_placement_changes_the_graph_masks(tmp_path, monkeypatch, fault):
    monkeypatch.setattr(masks._Placement, *FAULTS[fault])
    with opened(with_masks(network(3), SPACED), "onnxruntime", tmp_path) as session:
        masks_by_size = [session.masks(IMAGES, size, resampled_size(size, SPACED, spacing)) for size, spacing in PLACES]
    expected = [np.stack([restore(logits, size, SPACED, spacing) for logits in IMAGES]) for size, spacing in PLACES]
    assert not all(np.array_equal(*pair) for pair in zip(masks_by_size, expected, strict=True))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_equal_logits_go_to_the_lower_label_and_zero_is_background(tmp_path, backend):
    flat = np.zeros((1, 3, *SIZE), np.float32)
    tied = np.random.default_rng(0).integers(-1, 2, (1, 3, *SIZE)).astype(np.float32)  # two of three classes, any two
    for num_classes in (1, 3):
        folder = tmp_path / str(num_classes)
        folder.mkdir()
        with opened(with_masks(network(num_classes), STRETCHED), backend, folder) as session:
            assert not session.masks(flat, (40, 40), SIZE).any()
            expected = tied[:, :3].argmax(1) if num_classes == 3 else tied[:, 0] > 0
            np.testing.assert_array_equal(session.masks(tied, SIZE, SIZE), expected)


def test_appending_masks_does_not_change_the_original_graph():
    graph = network(3)
    for preprocessing, further in ((STRETCHED, ["source_size"]), (SPACED, ["source_size", "resampled_size"])):
        masked = with_masks(graph, preprocessing)
        assert [value.name for value in graph.model.graph.outputs] == [OUTPUT]
        assert [value.name for value in masked.model.graph.outputs] == [OUTPUT, "mask"]
        assert [value.name for value in masked.model.graph.inputs] == [INPUT, *further]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_graph_of_logits_does_not_claim_to_make_masks(tmp_path, backend):
    with opened(network(3), backend, tmp_path) as session:
        assert not session.gives_masks


def test_labels_that_are_resized_with_a_spline_are_refused_in_one_line():
    with pytest.raises(UsageError, match=r"resize=spline3.* choose --outputs logits"):
        with_masks(network(3), Preprocessing(image_size=SIZE, resize="spline3"))
