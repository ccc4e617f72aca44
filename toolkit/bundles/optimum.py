"""Let Hugging Face Optimum open a bundle: importing this module is all that it takes.

``ORTModelForSemanticSegmentation.from_pretrained("model.medseg")`` runs ``model.onnx``, the best graph that ONNX
Runtime was verified with at the build. Optimum asks for the class of ``config.json`` before it opens a graph, and the
one that is registered here checks every file of the bundle first.
"""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

from medseg_trt.bundles.bundle import DEFAULT_GRAPH, load_bundle
from medseg_trt.errors import ArtefactError, MissingExtraError, require

MODEL_TYPE = "medseg-trt"  # in config.json
TESTED: Mapping[str, str] = {"optimum-onnx": "0.1", "transformers": "4.57"}  # it breaks with transformers 5


def _transformers() -> ModuleType:
    """Import transformers.

    Raises:
        MissingExtraError: Optimum, transformers or ONNX Runtime is not installed, or not in a version that works.
    """
    for package, tested in TESTED.items():
        try:
            installed = version(package)
        except PackageNotFoundError:
            installed = "missing"
        if not installed.startswith(f"{tested}."):
            raise MissingExtraError(
                f"Optimum needs {package} {tested}, and here it is {installed}. "
                "Install it, best in an environment of its own: pip install 'medseg-trt[cpu,optimum]'"
            )
    require("onnxruntime", "cpu")
    return require("transformers", "optimum")


transformers = _transformers()


class MedsegConfig(transformers.PretrainedConfig):
    """What ``config.json`` of a bundle says, as attributes.

    ``image_size`` is (height, width) in pixels, ``num_logits`` the channels of the output: 1 for a binary network,
    which has two labels in ``id2label`` all the same.
    """

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
        """Return the config, after a check of the bundle it lies in where ``options`` name one: ``name_or_path``.

        Raises:
            ArtefactError: the bundle is damaged, is not on this machine, or takes more inputs than Optimum gives.
        """
        if "name_or_path" in options:
            _check(options["name_or_path"])
        return super().from_dict(config_dict, **options)


def _check(name: str) -> None:
    if not Path(name).is_dir():
        raise ArtefactError(
            f"{name} is no folder on this machine, and Optimum would fetch its graph without the weights. "
            f"Download it whole: hf download {name} --local-dir model.medseg"
        )
    bundle = load_bundle(name)
    if DEFAULT_GRAPH not in bundle.content.files:
        raise ArtefactError(
            f"{name} has no {DEFAULT_GRAPH}: at its build ONNX Runtime was verified with no graph. Build it again with "
            "ONNX Runtime: medseg-trt build --ckpt run/best.pt --backend onnxruntime"
        )
    if bundle.content.build.outputs == "mask":
        raise ArtefactError(
            f"{name} was built with --outputs mask, and Optimum cannot give its graph the size of the source image. "
            "Build it again: medseg-trt build --ckpt run/best.pt --outputs logits"
        )


transformers.AutoConfig.register(MODEL_TYPE, MedsegConfig)
