r"""Does the language block help, and what of it? All controls of ``ablate`` on the demo's scans, with three seeds.

The runs are made by the command itself, which goes on after an interrupt:

    medseg-trt samples get organs llama-block -o data
    medseg-trt block extract data/llama-block/SmolLM2-135M-Instruct.Q4_1.gguf -o block.safetensors
    medseg-trt ablate --recipe organs-demo --data data/organs --block block.safetensors -o runs \
      --set 'preprocessing.image_size=[64,64]' --set preprocessing.spacing_mm=6.0 \
      --set train.epochs=5 --set train.slices_per_epoch=160 --set train.warmup_steps=10
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
    "One scan trains and {cases} other judge(s). The intervals cover chance in the seeds, and cases as far as there "
    "are several; they do not cover other patients, scanners or organs.",
    "Every run sees {slices} slices, so all networks are far from trained to the end. What helps in the first steps "
    "may not help later, and the reverse.",
    "With {pairs} pairs, Student's t has {degrees} degrees of freedom, and correcting for {questions} questions widens "
    'it further: only a very large difference could be told from zero. "Not shown" is not "no effect".',
    "A difference that is told from zero would hold for this recipe on these scans, and for nothing else.",
    "The block is that of SmolLM2-135M, not of LLaMA-7B as in the paper.",
)


def to_markdown(result: Mapping[str, Any], page: str) -> str:
    """Return the page of ``ablate``, with what it cannot say after it."""
    ablation = result["ablation"]
    pairs = ablation["seeds"] * len(ablation["splits"])
    figures = {
        "cases": ablation["cases"],
        "slices": result["slices"],
        "pairs": pairs,
        "degrees": pairs - 1,
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
