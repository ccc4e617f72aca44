"""A batch in shards: the shards are the whole, dropout takes the rows of the whole, and micro-batches add up."""

import pytest
import torch
import torch.nn.functional as F
from tiny import TINY_LLAMA, tiny_recipe, tiny_spec
from torch import nn

from medseg_trt.train import loop
from medseg_trt.train.block.blocks import random_block
from medseg_trt.train.models.global_batch import BatchShard, Dropout, assign_shard, shards_for_rank
from medseg_trt.train.models.model import build_model
from medseg_trt.train.models.transunet import TransUNet
from medseg_trt.train.recipes.training_spec import TrainSpec
from medseg_trt.train.training_process import TrainingProcess


@pytest.mark.parametrize("accumulate", [1, 2, 3, 8])
@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("size", [3, 8, 11])
def test_every_row_is_computed_once_and_the_shares_are_even(size, processes, accumulate):
    shards_of_rank = [shards_for_rank(size, accumulate, processes, rank) for rank in range(processes)]
    rows = sorted(row for shards in shards_of_rank for shard in shards for row in range(shard.start, shard.stop))
    assert rows == list(range(size))
    assert len({len(shards) for shards in shards_of_rank}) == 1  # a process with fewer would leave the others waiting
    for micro_batch in zip(*shards_of_rank, strict=True):
        counts = [shard.stop - shard.start for shard in micro_batch]
        assert min(counts) >= 1
        assert max(counts) - min(counts) <= 1
        assert {shard.micro_batch_size for shard in micro_batch} == {sum(counts)}
    assert sum(shard.micro_batch_fraction for shard in shards_of_rank[0]) == pytest.approx(1)


def test_a_batch_cannot_have_fewer_rows_than_there_are_processes():
    with pytest.raises(ValueError, match=r"2 row\(s\) cannot be divided among 3 processes"):
        shards_for_rank(2, 1, 3, 0)


def as_drawn(x):
    return x


def as_tokens(x):  # as the patch embedding leaves them: the last axis is not the one that lies together in memory
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("layout", [as_drawn, as_tokens])
def test_dropout_draws_what_pytorchs_own_draws_and_a_shard_takes_its_rows(layout):
    x = layout(torch.randn(6, 10, 16))
    torch.manual_seed(5)
    expected = F.dropout(x, 0.3)
    layer = Dropout(0.3)
    torch.manual_seed(5)
    assert torch.equal(layer(x), expected)
    state = torch.get_rng_state()
    for shard in shards_for_rank(6, 2, 2, 1):
        assign_shard(layer, shard)
        torch.manual_seed(5)
        assert torch.equal(layer(layout(x[shard.start : shard.stop])), expected[shard.start : shard.stop])
        assert torch.equal(torch.get_rng_state(), state)  # all go on from the same place
    assert torch.equal(layer.eval()(x), x)


def test_dropout_keeps_one_byte_a_value_for_the_way_back():
    x, saved_bytes = torch.randn(4, 64, 64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved_bytes.append(tensor.nbytes) or tensor, lambda tensor: tensor
    ):
        Dropout(0.5)(x)
    assert max(saved_bytes) == x.numel()


def loss_and_gradients(accumulate, process):
    """Return those of one batch of eight lesions, with dropout but with BatchNorm's running statistics."""
    torch.manual_seed(0)
    model = build_model(tiny_spec(num_classes=1), random_block(TINY_LLAMA, seed=0)).train()
    assert isinstance(model, TransUNet)
    nn.init.normal_(model.position_embedding)
    for name, weight in model.named_parameters():
        if name.startswith(("bridge", "decoder", "head")) and weight.dim() == 4:
            nn.init.kaiming_normal_(weight)  # the tokens' share, and dropout's with it, would fade from stage to stage
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(8, 3, 32, 32, generator=generator)
    labels = (images[:, 0] > 1).long()
    shards = shards_for_rank(8, accumulate, 1, 0)
    fed = iter([(images[shard.start : shard.stop], labels[shard.start : shard.stop]) for shard in shards])
    torch.manual_seed(2)
    loss = loop._loss_and_gradients(model, fed, shards, process, TrainSpec())
    gradients = [weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]
    return loss, torch.cat(gradients), torch.rand(1)


@pytest.mark.parametrize("accumulate", [2, 3, 8])
def test_micro_batches_add_up_to_the_batch_where_nothing_looks_beyond_a_picture(accumulate, monkeypatch):
    process = TrainingProcess()
    loss, gradients, after = loss_and_gradients(1, process)
    again, accumulated, after_accumulation = loss_and_gradients(accumulate, process)
    # Sums of float32 in another order: a loss of 1 is off by 4e-8, and gradients of up to 9e-3 by 2e-8, as measured.
    assert again == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(accumulated, gradients, rtol=0, atol=2e-7)
    assert torch.equal(after, after_accumulation)  # random numbers go on as they would have
    monkeypatch.setattr(process, "set_random_state", lambda state: None)
    assert (loss_and_gradients(accumulate, process)[1] - gradients).abs().max() > 1e-4  # other masks are caught
    monkeypatch.undo()
    monkeypatch.setattr(BatchShard, "micro_batch_fraction", 1.0)
    assert (loss_and_gradients(accumulate, process)[1] - gradients).abs().max() > 1e-3  # and a sum for a mean


def test_an_epoch_clears_the_shard_of_every_layer():
    model = build_model(tiny_spec(num_classes=1), random_block(TINY_LLAMA, seed=0))
    assign_shard(model, shards_for_rank(4, 2, 1, 0)[0])
    assign_shard(model, None)
    assert all(getattr(layer, "shard", None) is None for layer in model.modules())


def test_more_micro_batches_than_pictures_are_refused():
    from medseg_trt.errors import UsageError

    with pytest.raises(UsageError, match=r"accumulate is 3; it must be 1 … batch_size, 2"):
        tiny_recipe("train.accumulate=3")
