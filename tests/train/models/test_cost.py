import pytest

from medseg_trt.train.models.cost import cost
from medseg_trt.train.models.model import model_spec


def test_the_block_and_its_mappers_cost_what_their_matrices_say():
    """There are 256 tokens; LLaMA-7B is 4096 wide, with 11008 in its feed-forward part, and the ViT is 768 wide."""
    tokens, width, feed_forward, vit = 256, 4096, 11008, 768
    per_token = 4 * width**2 + 3 * width * feed_forward + 2 * width * vit
    attention = 2 * tokens**2 * width  # the scores, and what they weigh
    with_block, without = (cost(model_spec(name, (256, 256), 1)) for name in ("llm-transunet", "transunet"))
    assert with_block.macs - without.macs == tokens * per_token + attention


@pytest.mark.parametrize(("size", "factor"), [((256, 512), 2), ((512, 512), 4)])
def test_convolutions_grow_with_the_image_and_attention_faster(size, factor):
    small, large = (cost(model_spec("transunet-tiny", image_size, 2)).macs for image_size in ((256, 256), size))
    assert factor * small < large < 1.2 * factor * small


def test_weights_take_four_bytes_each():
    tiny_cost = cost(model_spec("transunet-tiny", (32, 32), 2))
    assert tiny_cost.weight_bytes_fp32 == 4 * tiny_cost.parameters["total"]
