"""A bundle with engines that TensorRT-RTX builds on this machine, for several files of tests."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from medseg_trt.bundles.bundle import MANIFEST, Bundle, load_bundle
from medseg_trt.bundles.manifest import BuiltEngine, FileEntry
from medseg_trt.bundles.signature import signature_of
from medseg_trt.cli import cli
from medseg_trt.engines import build as engines
from medseg_trt.engines.build import build_engines
from medseg_trt.engines.child import EngineBuild, build_in_child
from medseg_trt.export.engine_layers import Outcome
from medseg_trt.files import sha256, write_json
from medseg_trt.inspection.engine import read_layer_report
from medseg_trt.spec import EngineSpec, to_dict

SPEC = EngineSpec(library="tensorrt-rtx", targets=("sm86", "sm89"), max_batch=4)
QKV = "q, k and v are one GEMM"
GATE_UP = "gate and up are one GEMM"
FUSED = "attention is one kernel"
INT8 = "INT8 GEMMs multiply Int8"
FP8 = "FP8 GEMMs multiply FP8"
STORED = "stored weights are decoded inside the GEMM"
COPIES = "no copy or scaling that no node asks for"
PLUGINS = "plugins stand for nodes of domain medseg"


@dataclass(frozen=True, kw_only=True)
class WithEngines:
    """A bundle with an engine of every precision; do not write to it."""

    bundle: Bundle
    texts: Mapping[str, str]  # of the builder's lists of layers, by precision

    def engine(self, precision: str, *, plugins: bool = False) -> BuiltEngine:
        variants = self.bundle.content.variants
        return next(
            engine
            for engine in self.bundle.content.engines
            if variants[engine.variant].precision == precision and engine.spec.plugins == plugins
        )

    def plan(self, precision: str, *, plugins: bool = False) -> Path:
        return self.bundle.folder / self.engine(precision, plugins=plugins).plan

    def graph(self, precision: str) -> Path:
        return self.bundle.folder / self.bundle.content.variants[self.engine(precision).variant].graph

    def outcomes(self, precision: str, *, plugins: bool = False) -> dict[str, Outcome]:
        return {outcome.name: outcome for outcome in read_layer_report(self.plan(precision, plugins=plugins)).outcomes}


def seal_again(folder: Path, built: Sequence[BuiltEngine]) -> None:
    """Let the manifest name the engines, and give digests of all that is in the folder."""
    data = json.loads((folder / MANIFEST).read_text())
    data["engines"] = [to_dict(engine) for engine in built]
    data["files"] = {
        path.relative_to(folder).as_posix(): to_dict(FileEntry(sha256=sha256(path), bytes=path.stat().st_size))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (MANIFEST, signature_of(folder / MANIFEST).name)
    }
    write_json(folder / MANIFEST, data)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, list(map(str, arguments)))


def make_with_engines(root: Path, built: Path) -> None:
    """Copy a bundle and build its engines as ``build`` does, and two more with plugins; keep the lists of layers."""
    folder = root / "model.medseg"
    shutil.copytree(built, folder)
    content, texts = load_bundle(folder).content, dict[str, str]()

    def recorded(graph: Path, plan: Path, spec: EngineSpec, cache: Path | None, gpu_number: int) -> EngineBuild:
        build = build_in_child(graph, plan, spec, cache, gpu_number)
        texts.setdefault(content.variants[graph.stem].precision, build.output.layers)
        return build

    verified = {execution.variant for execution in content.executions}
    with_plugins = ("fp16", "int8", "int8+fp16")
    chosen = {name: variant for name, variant in content.variants.items() if variant.precision in with_plugins}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "build_in_child", recorded)
        plain = build_engines(folder, content.variants, verified, SPEC, content.build.precisions)
        custom = build_engines(folder, chosen, verified, replace(SPEC, plugins=True), ["fp16", "int8"])
    assert [line for line in plain.rejected if not line.startswith("bf16")] == []
    seal_again(folder, (*plain.built, *custom.built))
    write_json(root / "texts.json", texts)
