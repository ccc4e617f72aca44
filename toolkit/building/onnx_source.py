"""A network that comes as an ONNX file with a description of its images and classes, instead of a checkpoint.

The reference is the file itself, run by ONNX Runtime as it is: nothing of this package changes it.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy import ndarray

from medseg_trt.building.bundle_steps import fused_graph, write_variants
from medseg_trt.building.contract import Contract
from medseg_trt.building.deployment import Deployment
from medseg_trt.building.executions import try_executions
from medseg_trt.building.reference import Reference
from medseg_trt.building.reference_images import reference_images
from medseg_trt.devices import AUTO, ComputeDevice
from medseg_trt.engines.choice import device_of_trials
from medseg_trt.errors import ArtefactError, InputError, UsageError, require
from medseg_trt.export.graph.imported import import_graph
from medseg_trt.export.graph.imported_file import DYNAMIC, ImportedFile, read_imported
from medseg_trt.export.graph.imported_wire import brief
from medseg_trt.export.graph.onnx_graph import OnnxGraph
from medseg_trt.external_spec import ExternalSpec
from medseg_trt.files import parse_json, read_limited
from medseg_trt.imaging.segment import Run
from medseg_trt.progress import LOG
from medseg_trt.sessions.first_run import limited_run
from medseg_trt.spec import BuildSpec, Classes, Preprocessing, from_dict

if TYPE_CHECKING:
    from medseg_trt.train.checkpoint import Checkpoint

MAX_DESCRIPTION_BYTES = 1 << 20
EXAMPLE = '{"preprocessing": {"image_size": [256, 256]}, "classes": {"names": ["background", "lesion"]}}'
REFERENCE = "the ONNX file"
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"  # a session of bytes knows no folder
PROBED_BATCH = 2  # a fixed batch of 1 inside of the network shows


@dataclass(frozen=True, kw_only=True, slots=True)
class OnnxDescription:
    """The content of the file after ``--preprocessing``: how images are prepared, and what the labels mean."""

    preprocessing: Preprocessing
    classes: Classes

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class OnnxSource:
    """A network in an ONNX file that was run once, so that its logits are known to fit its description."""

    checkpoint: "Checkpoint"  # without weights: spec, preprocessing and classes
    file: ImportedFile
    logits: int  # channels that the file's network gives
    reference: Run  # the file, run by ONNX Runtime: (batch, 3, H, W) to logits (batch, classes, H, W)

    def graph(self) -> OnnxGraph:
        """Return the graph in this package's form.

        Raises:
            ArtefactError: it cannot be brought into this form.
        """
        return limited_run(
            lambda: import_graph(self.file, self.checkpoint.spec, self.logits),
            f"the conversion of {self.file.path}",
            self.file.weight_bytes,
        )


def open_onnx(path: Path, description_file: Path) -> OnnxSource:
    """Read a network and its description, and run it once on an empty image.

    Args:
        path: the ONNX file; weights in other files must lie beside it.
        description_file: JSON with ``preprocessing``, the fields of ``Preprocessing``, and ``classes``, those of
            ``Classes``.

    Raises:
        InputError: a file does not exist.
        ArtefactError: the network cannot be used, or does not fit its description.
        MissingExtraError: ONNX Runtime is not installed.
    """
    from medseg_trt.train.checkpoint import Checkpoint

    for needed in (path, description_file):
        if not needed.is_file():
            raise InputError(f"{needed} does not exist; --onnx needs a network, and --preprocessing such as {EXAMPLE}")
    description = read_description(description_file)
    file = limited_run(lambda: read_imported(path), str(path), path.stat().st_size)
    preprocessing = description.preprocessing
    _check_input(file, preprocessing, description_file)

    def opened() -> tuple[Run, int]:
        run = _runner(file)
        return run, _probe(run, file, preprocessing.image_size, description.classes)

    run, logits = limited_run(opened, str(path), file.weight_bytes)
    if file.chose_labels:
        LOG.info("%s chooses labels itself; the logits that it chooses them from are used", path)
    spec = ExternalSpec(
        architecture=f"onnx:{path.stem}",
        image_size=preprocessing.image_size,
        num_classes=description.classes.num_logits,
    )
    checkpoint = Checkpoint(weights={}, spec=spec, preprocessing=preprocessing, classes=description.classes)
    return OnnxSource(
        checkpoint=checkpoint,
        file=file,
        logits=logits,
        reference=run if logits == spec.num_classes else _difference(run),
    )


def reference_of_onnx(
    source: OnnxSource, spec: BuildSpec, data: Path | None, device: ComputeDevice = AUTO
) -> Reference:
    """Run an ONNX file from elsewhere, as it is, on the images that every graph is compared on.

    The file runs on the CPU; ``device`` says where graphs and engines are tried.

    Raises:
        DeviceError: there is no such GPU.
        InputError: ``data`` cannot be used.
        UsageError: an image is in two splits, or ``data`` has other classes.
    """
    tried_on = device_of_trials(device)
    images = reference_images(source.checkpoint, data)
    images = replace(images, judged=replace(images.judged, reference=REFERENCE))
    contract = Contract.of(source.checkpoint)
    return Reference(network=source.reference, contract=contract, images=images, spec=spec, device=tried_on)


def deploy_onnx(folder: Path, source: OnnxSource, reference: Reference, golden_input: ndarray) -> Deployment:
    """Write the graphs of a network that came as an ONNX file, and try every way to run them.

    Raises:
        ArtefactError: its graph cannot be brought into this package's form.
        UsageError: a precision needs calibration images, and there are none.
        AccuracyGateError: a graph gives other logits or masks than the file.
    """
    LOG.info("convert %s; of folding and fusion, only BatchNorms apply", source.file.path.name)
    variants = write_variants(folder, fused_graph(source.graph(), {}), reference.spec, reference)
    golden = golden_input, source.reference(golden_input)
    tried = try_executions(folder, variants, reference.spec, reference, golden)
    return Deployment(variants=variants, tried=tried, golden=golden, block=None, reference=reference)


def read_description(path: Path) -> OnnxDescription:
    """Read how images are prepared, and what the labels mean.

    Raises:
        ArtefactError: it is no such description; the message names the field.
    """
    return from_dict(OnnxDescription, parse_json(path, read_limited(path, MAX_DESCRIPTION_BYTES)), str(path))


def _check_input(file: ImportedFile, preprocessing: Preprocessing, description_file: Path) -> None:
    fixed = [own if own is not None else asked for own, asked in zip(file.size, preprocessing.image_size, strict=True)]
    if tuple(fixed) != preprocessing.image_size:
        asked, own = preprocessing.image_size, tuple(fixed)
        raise UsageError(
            f"{file.path} takes images of {own[0]} x {own[1]} pixels, but {description_file} prepares them at "
            f"{asked[0]} x {asked[1]}; set image_size to [{own[0]}, {own[1]}]"
        )
    if (file.channels == 1) != (preprocessing.channel_order == "grey"):
        order = "grey" if file.channels == 1 else "rgb"
        raise UsageError(
            f"{file.path} takes images of {file.channels} channel{'s' if file.channels > 1 else ''}; set "
            f"channel_order to {order} in the preprocessing of {description_file}"
        )


def _runner(file: ImportedFile) -> Run:
    """Open the bytes that were checked in ONNX Runtime, as they are."""
    runtime = require("onnxruntime", "cpu")
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry(WEIGHTS_FOLDER, str(file.path.parent.resolve()))
    try:
        session: Any = runtime.InferenceSession(file.content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common base but Exception
        raise ArtefactError(f"ONNX Runtime refuses {file.path}: {brief(str(error).splitlines()[0])}") from error

    def run(batch: ndarray) -> ndarray:
        return session.run([file.output], {file.input: batch[:, : file.channels]})[0]

    return run


def _probe(run: Run, file: ImportedFile, size: tuple[int, int], classes: Classes) -> int:
    """Return the number of logits of a pixel, once an empty batch has been run."""
    try:
        shape = run(np.zeros((PROBED_BATCH, 3, *size), np.float32)).shape
    except Exception as error:  # ONNX Runtime's errors have no common base but Exception
        reason = str(error).splitlines()[0][-200:]
        raise ArtefactError(
            f"{file.path} does not run with {PROBED_BATCH} images of {size[0]} x {size[1]} pixels: {reason}; if its "
            f"batch is fixed inside, {DYNAMIC}"
        ) from error
    names = classes.names
    if shape[:1] != (PROBED_BATCH,) or len(shape) != 4:
        raise ArtefactError(
            f"{file.path} gives {shape} for {PROBED_BATCH} images; its batch is fixed inside: {DYNAMIC}"
        )
    if shape[1:3] == size and shape[3] in (len(names), classes.num_logits):
        raise ArtefactError(
            f"{file.path} gives logits {shape}, channels last; export them channels first: (batch, classes, H, W)"
        )
    if shape[2:] != size:
        raise ArtefactError(
            f"{file.path} gives logits of {shape[2]} x {shape[3]} pixels for images of {size[0]} x {size[1]}; let the "
            "network resize them itself, and export it again"
        )
    if shape[1] not in (classes.num_logits, len(names)):
        raise ArtefactError(
            f"{file.path} gives {shape[1]} logits a pixel, but {len(names)} classes ({', '.join(names)}) need "
            f"{' or '.join(map(str, sorted({classes.num_logits, len(names)})))}; name its classes in their order"
        )
    return shape[1]


def _difference(run: Run) -> Run:
    """Return the one logit of a binary network that gives two: above 0 where the second is the larger one."""

    def run_difference(batch: ndarray) -> ndarray:
        logits = run(batch)
        return logits[:, 1:] - logits[:, :1]

    return run_difference
