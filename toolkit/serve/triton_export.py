"""Write a bundle as a model repository of NVIDIA's Triton Inference Server: graph, weights, labels, configuration.

The files are the bundle's own, copied; Triton prepares no images and restores no masks, so its clients do.
Source: triton-inference-server, ``model_repository.md`` and ``model_config.proto``.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from medseg_trt.bundles.bundle import Bundle
from medseg_trt.bundles.manifest import BuiltEngine, Variant
from medseg_trt.errors import InputError, UsageError
from medseg_trt.export.graph.interface import INPUT, MASK, OUTPUT, RESAMPLED, SIZE
from medseg_trt.files import atomic_folder

ONNX, TENSORRT = "onnxruntime_onnx", "tensorrt_plan"  # Triton's platforms
TENSORRT_LIBRARY = "tensorrt"  # Triton runs no plans of TensorRT-RTX
MAX_BATCH = 8
DELAY_MICROSECONDS = 2000
CONFIG, LABELS, VERSION = "config.pbtxt", "labels.txt", "1"


@dataclass(frozen=True, kw_only=True, slots=True)
class TritonModel:
    """A model of the repository."""

    name: str
    platform: str
    folder: Path
    precision: str


def export_triton(bundle: Bundle, output: Path) -> tuple[TritonModel, ...]:
    """Write the repository: an ONNX Runtime model, and one for every TensorRT engine of the bundle.

    Args:
        bundle: what to export.
        output: the repository; folders of other models in it are kept.

    Raises:
        UsageError: the bundle has no graph that ONNX Runtime was verified with.
        InputError: a model's folder exists and is no model of Triton.
    """
    name = bundle.folder.resolve().name.removesuffix(".medseg")
    executions = [execution for execution in bundle.content.executions if execution.backend == "onnxruntime"]
    if not executions:
        raise UsageError(
            f"{bundle.folder} has no graph that ONNX Runtime was verified with; build one: --backend onnxruntime"
        )
    models = [_write_onnx(bundle, bundle.variant(executions[0]), name, output)]
    engines = [engine for engine in bundle.content.engines if engine.spec.library == TENSORRT_LIBRARY]
    for engine in engines:
        targets = "-".join(engine.spec.targets)
        precision = bundle.content.variants[engine.variant].precision
        models.append(_write_engine(bundle, engine, f"{name}-{precision}-{targets}", output))
    return tuple(models)


def config_text(bundle: Bundle, name: str, platform: str, max_batch: int) -> str:
    """Return ``config.pbtxt`` of a model.

    Args:
        bundle: its inputs, outputs and classes.
        name: of the model.
        platform: ``ONNX`` or ``TENSORRT``.
        max_batch: images per run, where Triton may join requests.
    """
    height, width = bundle.preprocessing.image_size
    gives_masks = bundle.content.build.outputs == "mask"
    joined = not gives_masks  # the size of a mask has no batch axis, so Triton cannot join such requests
    batch = () if joined else (-1,)
    inputs = [_tensor(INPUT, "TYPE_FP32", (*batch, 3, height, width))]
    model_size = bundle.content.model.image_size
    outputs = [_tensor(OUTPUT, "TYPE_FP32", (*batch, bundle.content.model.num_classes, *model_size), labels=True)]
    if gives_masks:
        inputs.append(_tensor(SIZE, "TYPE_INT64", (2,)))
        if bundle.preprocessing.spacing_mm is not None:
            inputs.append(_tensor(RESAMPLED, "TYPE_INT64", (2,)))
        outputs.append(_tensor(MASK, "TYPE_UINT8", (-1, -1, -1)))
    lines = [
        f'name: "{name}"',
        f'platform: "{platform}"',
        f"max_batch_size: {max_batch if joined else 0}",
        *(f"input {{\n{tensor}\n}}" for tensor in inputs),
        *(f"output {{\n{tensor}\n}}" for tensor in outputs),
    ]
    if joined:
        lines.append(f"dynamic_batching {{\n  max_queue_delay_microseconds: {DELAY_MICROSECONDS}\n}}")
    return "\n".join(lines) + "\n"


def _tensor(name: str, kind: str, dims: Sequence[int], *, labels: bool = False) -> str:
    lines = [f'name: "{name}"', f"data_type: {kind}", f"dims: [ {', '.join(map(str, dims))} ]"]
    if labels:
        lines.append(f'label_filename: "{LABELS}"')
    return "\n".join(f"  {line}" for line in lines)


def _write_onnx(bundle: Bundle, variant: Variant, name: str, output: Path) -> TritonModel:
    files = {"model.onnx": variant.graph, variant.weights: variant.weights}
    config = config_text(bundle, name, ONNX, MAX_BATCH)
    folder = _write(bundle, output / name, config, files)
    return TritonModel(name=name, platform=ONNX, folder=folder, precision=variant.precision)


def _write_engine(bundle: Bundle, engine: BuiltEngine, name: str, output: Path) -> TritonModel:
    config = config_text(bundle, name, TENSORRT, engine.spec.max_batch)
    folder = _write(bundle, output / name, config, {"model.plan": engine.plan})
    precision = bundle.content.variants[engine.variant].precision
    return TritonModel(name=name, platform=TENSORRT, folder=folder, precision=precision)


def _write(bundle: Bundle, folder: Path, config: str, files: Mapping[str, str]) -> Path:
    """Write a model with the bytes that the manifest describes; ``files`` are names there and in the bundle."""
    if folder.exists() and not (folder / CONFIG).is_file():
        raise InputError(f"{folder} exists and is no model of Triton; choose another repository with -o")
    with bundle.private_copy(files.values()) as verified, atomic_folder(folder) as temporary:
        (temporary / VERSION).mkdir()
        for name, name_in_bundle in files.items():
            shutil.copyfile(verified / name_in_bundle, temporary / VERSION / name)
        (temporary / LABELS).write_text("\n".join(bundle.classes.names) + "\n", encoding="utf-8")
        (temporary / CONFIG).write_text(config, encoding="utf-8")
    return folder
