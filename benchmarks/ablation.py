r"""Does the language block help, and what of it? All controls of ``ablate`` on the demo's scans, with three seeds.

The runs are made by the command itself, which goes on after an interrupt:

    medseg-trt samples get organs llama-block -o data
    medseg-trt block extract data/llama-block/SmolLM2-135M-Instruct.Q4_1.gguf -o block.safetensors
    medseg-trt ablate --recipe organs-demo --data data/organs --block block.safetensors -o runs \
      --set 'preprocessing.image_size=[64,64]' --set preprocessing.spacing_mm=6.0 \
      --set train.epochs=5 --set train.slices_per_epoch=160 --set train.warmup_steps=10 --note '…'
    python benchmarks/ablation.py runs

The page is that of ``ablate``, with what its figures cannot say.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from results_file import options, publish

NAME = "ablation"  # of the files of ``ablate`` and of the result
LIMITS = (
    "One scan trains and another one is scored. The intervals cover chance in the seeds; they do not cover other "
    "patients, scanners or organs.",
    "Every run sees {slices} slices, so all networks are far from trained to the end. What helps in the first steps "
    "may not help later, and the reverse.",
    '"Not shown" is not "no effect": an effect of a few points would not be seen with {pairs} pairs of runs and '
    "{questions} questions. A difference that is shown would hold for this recipe on these scans, and for nothing "
    "else.",
    "The block is that of SmolLM2-135M, not of LLaMA-7B as in the paper.",
)


def to_markdown(result: Mapping[str, Any], page: str) -> str:
    """Return the page of ``ablate``, with what it cannot say after it."""
    ablation = result["ablation"]
    figures = {
        "slices": result["slices"],
        "pairs": ablation["seeds"] * len(ablation["splits"]),
        "questions": len(ablation["comparisons"]),
    }
    return "\n".join([page, "What this does not say:", "", *(f"- {limit.format(**figures)}" for limit in LIMITS), ""])


def main() -> None:
    """Take the results of finished runs into the folder of results."""
    parser = options(__doc__)
    parser.add_argument("runs", type=Path, help="the output folder of ablate")
    chosen = parser.parse_args()
    ablation = json.loads((chosen.runs / f"{NAME}.json").read_text(encoding="utf-8"))
    recipe = json.loads(next(chosen.runs.glob("*/recipe.json")).read_text(encoding="utf-8"))
    result = {
        "ablation": ablation,
        "slices": recipe["train"]["epochs"] * recipe["train"]["slices_per_epoch"],
    }
    page = (chosen.runs / f"{NAME}.md").read_text(encoding="utf-8")
    publish("ablation", result, lambda published: to_markdown(published, page), chosen)
    shutil.copy(chosen.runs / f"{NAME}.png", chosen.output / f"{NAME}.png")


if __name__ == "__main__":
    main()
