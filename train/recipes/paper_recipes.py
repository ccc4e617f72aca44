"""The protocols of Jiang & Liu 2024, for TransUNet and, with ``--set architecture=llm-transunet``, LLM-TransUNet.

What the paper does not say is taken from the code that it follows, and can be changed with ``--set``:

=====================  ==============================================================================================
``input_scale``        lesions: "unext". UNeXt normalises with ImageNet's figures and then divides by 255 once more
``channel_order``      lesions: ``preprocessing.channel_order=bgr``, as OpenCV reads pictures
``pretrained``         "file": the encoder starts from R50+ViT-B_16, which the paper says of no lesion set
``data.order``         "natural": the order of the files before the split of seed 41 was that of the authors' disk
``data.masks``         BUSI, several masks of a picture: "or" merges them; ``data.normals=exclude``
``data.count``         ColonDB: 380 pictures, not the 300 of the first release
``image_size``         ``preprocessing.image_size``: 256 x 256, as the text has it; the code of Synapse has 224
``train.best``         lesions: "iou" on the validation split; Synapse: "last"; ACDC: "dice", or "last"
``train.seed``         1234 for all, which TransUNet has and nobody states for the lesions
``insert.norm``        "ones": the final norm of the language model is left at one
=====================  ==============================================================================================

Where OpenCV rounds a resized picture to whole numbers, ours keeps floats, and where its masks take the pixel that lies
up and to the left, ours take the nearest. Pictures are resized before they are turned and mirrored, which gives the
same picture (``tests/toolkit/imaging/test_preprocess_protocols.py``).

Sources: UNeXt-pytorch ``train.py``, ``dataset.py``; Beckschen/TransUNet ``trainer.py``, ``dataset_synapse.py``;
juntaoJianggavin/LLM4MedSeg ``dataset_ACDC.py``.
"""

from dataclasses import replace

from medseg_trt.spec import Preprocessing
from medseg_trt.train.datasets.options import DataOptions
from medseg_trt.train.recipes.augment import Step
from medseg_trt.train.recipes.training_spec import Recipe, TrainSpec


def lesions(dataset: str) -> Recipe:
    """ISIC 2017, BUSI, CVC-ClinicDB or CVC-ColonDB: one lesion in a picture, as UNeXt trains.

    Half the binary cross-entropy plus Dice; Adam with 1e-4, by half a cosine to 1e-5, which changes once an epoch; the
    epoch with the strictly highest IoU of ``unext_batch`` on the validation split.
    """
    return Recipe(
        architecture="transunet",
        preprocessing=Preprocessing(image_size=(256, 256), resize="linear", channel_order="bgr"),
        input_scale="unext",
        augmentation=(Step(name="rotate90", probability=0.5), Step(name="flip", probability=0.5)),
        train=TrainSpec(
            epochs=200,
            batch_size=8,
            optimizer="adam",
            learning_rate=1e-4,
            min_learning_rate=1e-5,
            weight_decay=1e-4,
            schedule="cosine",
            schedule_step="epoch",
            drop_last=True,
            validate_with="unext_batch",
            best="iou",
            first_of_equals=True,
        ),
        data=DataOptions(dataset=dataset),
        pretrained="file",
    )


def synapse() -> Recipe:
    """BTCV, eight organs in CT, as TransUNet trains: no validation, the last of 150 epochs.

    Half the cross-entropy plus half the Dice loss; SGD with 0.01, which falls after every step of 13,950, 93 an epoch
    of 2,211 slices in batches of 24. A slice is turned and mirrored, or else rotated, or left alone, at 512 x 512
    pixels, and then resized with splines of order 3; its labels with order 0.
    """
    return Recipe(
        architecture="transunet",
        preprocessing=Preprocessing(image_size=(256, 256), window=(-125.0, 275.0), resize="spline3"),
        input_scale="unit",
        augmentation=(Step(name="turn_or_rotate", options={"degrees": 20.0}),),
        augment_at="source",
        train=TrainSpec(
            epochs=150,
            batch_size=24,
            optimizer="sgd",
            learning_rate=0.01,
            momentum=0.9,
            weight_decay=1e-4,
            schedule="poly",
            schedule_step="after",
            drop_last=False,
            best="last",
            keep_epochs=(100,),
        ),
        data=DataOptions(dataset="synapse"),
        pretrained="file",
    )


def acdc() -> Recipe:
    """ACDC, the heart in MR, as TransUNet trains; the best mean Dice on the validation patients.

    Volumes are scaled between their smallest and largest value, as SSL4MIS's files are. The authors' training resizes
    slices with order 0, their test with order 3. There is no published trainer: RWKV-UNet's, by the same author,
    validates every 100 steps, which here is every epoch.
    """
    recipe = synapse()
    return replace(
        recipe,
        preprocessing=Preprocessing(image_size=(256, 256), own_window=True, resize="spline3"),
        training_resize="spline0",
        train=replace(recipe.train, best="dice", first_of_equals=True, keep_epochs=()),
        data=DataOptions(dataset="acdc"),
    )
