"""Recipes of the demos, which train in minutes on two CPU cores."""

from medseg_trt.spec import Preprocessing
from medseg_trt.train.recipes.augment import Step
from medseg_trt.train.recipes.training_spec import Recipe, TrainSpec
from medseg_trt.window_spec import Windows


def organs_demo() -> Recipe:
    """Abdominal organs on CT slices of 3 mm pixels, in minutes on two CPU cores.

    No mirroring: it would turn a left kidney into a right one. Classes are drawn evenly, since most slices hold none of
    the small organs; 128 x 128 pixels make 64 tokens.
    """
    return Recipe(
        architecture="llm-transunet-small",
        preprocessing=Preprocessing(image_size=(128, 128), window=(-125.0, 275.0), spacing_mm=3.0),
        augmentation=(
            Step(name="affine", options={"degrees": 15.0, "scale": 1.25, "shift": 0.09}),
            Step(name="intensity", options={"gamma": 1.35, "contrast": 1.18, "brightness": 0.25}),
            Step(name="noise", probability=0.5, options={"deviation": 0.2}),
        ),
        train=TrainSpec(
            epochs=10,
            batch_size=8,
            slices_per_epoch=400,
            balance_classes=True,
            learning_rate=1e-3,
            weight_decay=1e-2,
            min_learning_rate=1e-5,
            warmup_steps=50,
            max_gradient_norm=1.0,
        ),
    )


def tumours_demo() -> Recipe:
    """One tumour in MR or CT against everything else, in minutes on two CPU cores.

    Half of the slices that are drawn at the least hold the tumour; in the training scans a fifth does. A fixed window
    serves both kinds: in CT, -200 … 1200 Hounsfield units cut off air and lung; in MR the unit is arbitrary, and a scan
    of small numbers comes out dark. The stem's kernels have a mean of zero and its norms divide by the spread, so that
    the network sees little of a slice's level and contrast; ``intensity`` changes them further. Slices are stretched to
    the image: the smallest scan would be 12 x 32 of the pixels of 2.5 mm that the largest needs.
    """
    return Recipe(
        architecture="llm-transunet-small",
        preprocessing=Preprocessing(image_size=(128, 128), window=(-200.0, 1200.0)),
        augmentation=(
            Step(name="flip", probability=0.5),
            Step(name="affine", options={"degrees": 30.0, "scale": 1.4, "shift": 0.15}),
            Step(name="intensity", options={"gamma": 1.5, "contrast": 1.5, "brightness": 0.5}),
            Step(name="noise", probability=0.5, options={"deviation": 0.2}),
        ),
        train=TrainSpec(
            epochs=10,
            batch_size=8,
            slices_per_epoch=400,
            balance_classes=True,
            learning_rate=1e-3,
            weight_decay=1e-2,
            min_learning_rate=1e-5,
            warmup_steps=50,
            max_gradient_norm=1.0,
        ),
    )


def cells_demo() -> Recipe:
    """Cells in microscope pictures of 1100 x 700 pixels, in windows at their own resolution.

    A nucleus is about 25 pixels wide: in a picture that is resized to the network's 128 x 128 pixels it would have
    three. So training, validation and inference take windows of 128 x 128 pixels of the picture. The range of values is
    that of each picture: they take up a ninth of the 16 bits. A picture has no upper side, and every turn is one more.
    """
    return Recipe(
        architecture="llm-transunet-small",
        preprocessing=Preprocessing(image_size=(128, 128), own_window=True, windows=Windows()),
        augmentation=(
            Step(name="rotate90", probability=0.5),
            Step(name="flip", probability=0.5),
            Step(name="intensity", options={"gamma": 1.35, "contrast": 1.18, "brightness": 0.25}),
        ),
        train=TrainSpec(
            epochs=5,
            batch_size=8,
            slices_per_epoch=200,
            balance_classes=True,
            learning_rate=1e-3,
            weight_decay=1e-2,
            min_learning_rate=1e-5,
            warmup_steps=25,
            max_gradient_norm=1.0,
        ),
    )
