"""The protocols of the authors of Swin-UNet and DS-TransUNet; ``paper_recipes`` has those for all networks.

What differs from their code: DS-TransUNet trains every batch at 384, 512 and 640 pixels in turn and resizes masks with
interpolation, so that targets are soft; here a batch is trained once, at 512 pixels, with whole labels. U-Net's authors
give none for these data sets.

Sources: HuCaoFighting/Swin-Unet ``train.sh``, ``trainer.py`` at 9765f8f, the last commit that runs on Synapse;
TianBaoGe/DS-TransUNet ``train_kvasir.py``.
"""

from dataclasses import replace

from medseg_trt.spec import Preprocessing
from medseg_trt.train.recipes.loss_spec import LossSpec
from medseg_trt.train.recipes.paper_recipes import synapse
from medseg_trt.train.recipes.training_spec import Recipe, TrainSpec


def swin_unet_synapse() -> Recipe:
    """Swin-UNet on BTCV, as its authors train: TransUNet's protocol at 224 x 224, with five times its learning rate.

    Of the loss, 0.4 are the cross-entropy and 0.6 Dice. The encoder, and the blocks of the decoder, start from Swin-T.
    """
    recipe = synapse()
    return replace(
        recipe,
        architecture="swin-unet",
        preprocessing=replace(recipe.preprocessing, image_size=(224, 224)),
        train=replace(recipe.train, learning_rate=0.05, loss=LossSpec(cross_entropy=0.4)),
    )


def ds_transunet_polyps() -> Recipe:
    """DS-TransUNet-B on polyps, as its authors train on Kvasir-SEG, for a folder of anyone's pictures of one class.

    No augmentation; SGD whose rate goes from 0.001 to a tenth and back every 400 epochs; every gradient is clipped at
    0.1. The loss is the cross-entropy plus an IoU that weights edges, of the logits and of two auxiliary heads.
    """
    return Recipe(
        architecture="ds-transunet-b",
        preprocessing=Preprocessing(image_size=(512, 512), resize="linear"),
        input_scale="imagenet",
        train=TrainSpec(
            epochs=1000,
            batch_size=16,
            optimizer="sgd",
            learning_rate=1e-3,
            min_learning_rate=1e-4,
            momentum=0.9,
            weight_decay=1e-4,
            schedule="cosine_five_times",
            schedule_step="epoch",
            max_gradient=0.1,
            loss=LossSpec(binary="structure"),
            drop_last=False,
            best="dice",
            first_of_equals=True,
        ),
        pretrained="file",
    )
