"""Stochastic depth: leave a residual branch out for whole images while training."""

from torch import Tensor

from medseg_trt.train.models.global_batch import Dropout, unsharded


class DropPath(Dropout):
    """Drop a branch for an image with a probability, and scale it up where it is kept.

    Source: Huang et al. 2016, "Deep Networks with Stochastic Depth"; timm, ``drop_path``.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.probability == 0:
            return x
        shard = self.shard or unsharded(len(x))
        kept = x.new_empty(shard.global_batch_size, *(1 for _ in x.shape[1:])).bernoulli_(1 - self.probability)
        return x * kept[shard.start : shard.stop].div_(1 - self.probability)
