"""The augmented slices of an epoch in training order, determined by the seed and the epoch."""

import numpy as np
from torch.utils.data import Dataset

from medseg_trt.train.datasets.prepared import PreparedSlices
from medseg_trt.train.recipes.augment import augment, worker_steps
from medseg_trt.train.recipes.training_spec import Recipe


def dropout_seed(seed: int, epoch: int) -> int:
    """Return the seed of PyTorch's generator for one epoch, mixed from both numbers.

    ``seed + epoch`` would give epoch 2 of seed 1 the dropout masks of epoch 1 of seed 2. PyTorch's CPU generator uses
    the low 32 bits only, so the result has 32 bits: two different pairs are equal with a probability of 2⁻³².
    """
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])


class EpochSlices(Dataset[tuple[np.ndarray, np.ndarray]]):
    """The augmented slices of one epoch; item ``i`` is the same in every process and at every access."""

    def __init__(self, slices: PreparedSlices, recipe: Recipe, epoch: int) -> None:
        self.slices = slices
        self.recipe = recipe
        self.epoch = epoch
        rng = np.random.default_rng([recipe.train.seed, epoch])
        count = recipe.train.slices_per_epoch or len(slices.images)
        if recipe.train.balance_classes:
            present = [label for label, holding in enumerate(slices.slices_of_class) if len(holding)]
            self.drawn_labels = [present[number] for number in rng.integers(len(present), size=count)]
            self.order = np.array([rng.choice(slices.slices_of_class[label]) for label in self.drawn_labels])
        else:
            self.drawn_labels = [None] * count
            laps = -(-count // len(slices.images))
            self.order = np.concatenate([rng.permutation(len(slices.images)) for _ in range(laps)])[:count]
        self.steps = [recipe.augmentation] * count
        if recipe.train.rng == "faithful":
            self.steps = worker_steps(recipe.augmentation, recipe.train.seed, count, recipe.train.batch_size)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, item: int) -> tuple[np.ndarray, np.ndarray]:
        seed = [self.recipe.train.seed, self.epoch, item + 1]  # NumPy pads with zeros: [s, e, 0] would repeat [s, e]
        rng = np.random.default_rng(seed)
        index = int(self.order[item])
        image, labels = self.slices.draw(index, self.drawn_labels[item], rng)
        image, labels = self.slices.finish(*augment(image, labels, self.steps[item], rng))
        return image, labels.astype(np.int64)
