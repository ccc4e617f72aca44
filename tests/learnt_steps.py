"""Post-processing steps that no build has learnt."""

from medseg_trt.postprocess.steps import ClassSteps, Gain, Kind, Postprocessing, Unit
from medseg_trt.spec import Classes

CLASSES = Classes(names=("background", "disc", "bar"))
GAIN = Gain(before=0.5, after=0.6, low=0.05, high=0.15, units="cases")


def steps_of(name: str = "disc", **fields) -> ClassSteps:
    return ClassSteps(name=name, gain=GAIN, **fields)


def post_of(*classes: ClassSteps, kind: Kind = "volume", unit: Unit = "mm3") -> Postprocessing:
    return Postprocessing(kind=kind, unit=unit, classes=classes, gain=GAIN, cases=5, slices=50, description="generated")
