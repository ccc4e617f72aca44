"""The authors' checkpoints give the logits of the published forward pass; what does not fit is named and refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from published_forward import published_logits

from medseg_trt.cli import cli
from medseg_trt.errors import ArtefactError, MedsegError, UsageError
from medseg_trt.spec import BlockSpec, Classes, Preprocessing
from medseg_trt.train.block.blocks import load_block, save_block
from medseg_trt.train.checkpoint import load_checkpoint
from medseg_trt.train.models.model import TINY_LLAMA, build_model, model_spec, runner
from medseg_trt.train.official_weights import import_official, read_state
from medseg_trt.train.weights.weight_names import LLM4MEDSEG, TRANSUNET, names_elsewhere

SIZE = (32, 32)
MHA = BlockSpec(hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=4, head_dim=16)  # as LLaMA-1 has it
THREE = Classes(names=("background", "disc", "bar"))
PREPROCESSING = Preprocessing(image_size=(256, 256), resize="spline3", window=(-125.0, 275.0))
OURS, LLM = "transunet-tiny", "llm-transunet-tiny"


def official_state(architecture, size=SIZE, classes=3, seed=0, half=True):
    """Make seeded weights under the authors' names, every one of which matters to the logits.

    The language layer's are numbers of 16 bits, as those of LLaMA's file are, unless ``half`` is false.
    """
    spec = model_spec(architecture, size, classes)
    if spec.block is not None:
        spec = replace(spec, block=MHA)
    with torch.device("meta"):
        ours = build_model(spec).state_dict()
    sources = names_elsewhere(LLM4MEDSEG if spec.block is not None else TRANSUNET, ours)
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, like in ours.items():
        key = sources[name].name
        noise = torch.randn(like.shape, generator=generator) if like.dim() else torch.zeros(())
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(7)
        elif key.endswith("running_var"):
            state[key] = 1 + 0.3 * noise.abs()
        elif key.endswith("llama.norm.weight"):
            state[key] = torch.ones(like.shape)
        elif like.dim() == 1:
            state[key] = ("bias" not in key and "running_mean" not in key) + 0.2 * noise
        elif key.endswith("position_embeddings"):
            state[key] = noise
        else:
            state[key] = noise * (2 / like[0].numel()) ** 0.5
        if ".llama.layers." in key and half:
            state[key] = state[key].half().float()
    return state


def saved(path, state, prefix=""):
    torch.save({prefix + name: value for name, value in state.items()}, path)
    return path


def oracle(state, image):
    with torch.inference_mode():
        logits = published_logits(state, torch.from_numpy(image), vit_heads=4, llama_head_dim=TINY_LLAMA.head_dim)
    return logits.numpy()


def image(size=SIZE, seed=1):
    return np.random.default_rng(seed).normal(size=(2, 3, *size)).astype(np.float32)


def largest_difference(checkpoint, state, size=SIZE):
    """Return the largest difference of the logits, as a share of the largest logit."""
    expected = oracle(state, image(size))
    return np.abs(runner(checkpoint.model())(image(size)) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("architecture", [OURS, LLM])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("size", [(32, 32), (32, 48)])
def test_the_logits_are_those_of_the_published_forward_pass(tmp_path, architecture, prefix, size):
    state = official_state(architecture, size)
    path = saved(tmp_path / "official.pth", state, prefix)
    imported = import_official(
        path,
        tmp_path / "model.pt",
        preprocessing=PREPROCESSING,
        classes=THREE,
        architecture=architecture,
        image_size=None if size == (32, 32) else size,
    )
    again = load_checkpoint(tmp_path / "model.pt")
    assert again.spec == imported.spec
    assert (again.preprocessing.image_size, again.preprocessing.resize) == (size, "spline3")
    # float32 through twenty layers twice in another order; a single weight that is wrong gives 1e-3 and more
    assert largest_difference(again, state, size) < 1e-5


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("transformer.encoder.layer.1.attn.query.weight", "transformer.encoder.layer.1.attn.key.weight"),
        ("transformer.encoder.layer.0.attention_norm.bias", "transformer.encoder.layer.0.ffn_norm.bias"),
        ("transformer.llama.layers.0.feed_forward.w1.weight", "transformer.llama.layers.0.feed_forward.w3.weight"),
        ("transformer.llama.layers.0.attention_norm.weight", "transformer.llama.layers.0.ffn_norm.weight"),
        ("decoder.blocks.2.conv2.1.running_mean", "decoder.blocks.2.conv2.1.bias"),
        (
            "transformer.embeddings.hybrid_model.body.block1.unit1.gn3.bias",
            "transformer.embeddings.hybrid_model.body.block1.unit1.gn_proj.bias",
        ),
    ],
)
def test_two_weights_that_were_exchanged_would_be_noticed(tmp_path, first, second):
    state = official_state(LLM)
    exchanged = state | {first: state[second], second: state[first]}
    path = saved(tmp_path / "official.pth", exchanged)
    imported = import_official(
        path, tmp_path / "model.pt", preprocessing=PREPROCESSING, classes=THREE, architecture=LLM
    )
    if "gn_proj" in second or "gn3" in first:  # the sum of the two biases is what counts
        assert largest_difference(imported, state) < 1e-5
    else:
        assert largest_difference(imported, state) > 1e-3


def test_the_frozen_layer_becomes_a_file_of_its_own_in_16_bits(tmp_path):
    state = official_state(LLM)
    path = saved(tmp_path / "official.pth", state)
    imported = import_official(
        path, tmp_path / "out" / "model.pt", preprocessing=PREPROCESSING, classes=THREE, architecture=LLM
    )
    assert imported.block_file is not None
    assert imported.block_sha256 is not None
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "model.pt",
        f"block-{imported.block_sha256[:16]}.safetensors",
    }
    (block,) = load_block(imported.block_file, imported.block_sha256)
    assert {tensor.dtype for tensor in block.tensors.values()} == {torch.float16}
    assert block.spec == imported.spec.block == MHA
    assert not [name for name in imported.weights if name.startswith(("insert.block", "insert.final_norm"))]
    assert imported.spec.insert.norm == "ones"
    assert imported.provenance.imported is not None
    assert imported.provenance.imported.file == "official.pth"


def test_a_layer_that_needs_32_bits_keeps_them_and_a_final_norm_that_is_not_ones_goes_with_it(tmp_path):
    state = official_state(LLM, half=False)
    state["transformer.llama.norm.weight"] = torch.linspace(0.5, 1.5, 64)
    path = saved(tmp_path / "official.pth", state)
    imported = import_official(
        path, tmp_path / "model.pt", preprocessing=PREPROCESSING, classes=THREE, architecture=LLM
    )
    assert imported.block_file is not None
    (block,) = load_block(imported.block_file)
    assert {tensor.dtype for tensor in block.tensors.values()} == {torch.float32}
    assert imported.spec.insert.norm == "pretrained"
    assert largest_difference(imported, state) < 1e-5


def test_a_checkpoint_without_the_frozen_layer_takes_it_from_a_file(tmp_path):
    state = official_state(LLM)
    whole = import_official(
        saved(tmp_path / "whole.pth", state),
        tmp_path / "whole.pt",
        preprocessing=PREPROCESSING,
        classes=THREE,
        architecture=LLM,
    )
    trained = {name: value for name, value in state.items() if ".llama." not in name}
    path = saved(tmp_path / "trained.pth", trained)
    with pytest.raises(UsageError, match="does not hold the frozen language layer; give it: --block"):
        import_official(path, tmp_path / "model.pt", preprocessing=PREPROCESSING, classes=THREE, architecture=LLM)
    assert not (tmp_path / "model.pt").exists()
    for source in (path, tmp_path / "whole.pth"):
        imported = import_official(
            source,
            tmp_path / "model.pt",
            preprocessing=PREPROCESSING,
            classes=THREE,
            architecture=LLM,
            block=whole.block_file,
        )
        assert imported.block_sha256 == whole.block_sha256
        assert largest_difference(imported, state) < 1e-5
    other = saved(tmp_path / "other.pth", official_state(LLM, seed=5))
    with pytest.raises(UsageError, match="another language layer"):
        import_official(
            other,
            tmp_path / "m.pt",
            preprocessing=PREPROCESSING,
            classes=THREE,
            architecture=LLM,
            block=whole.block_file,
        )


def test_a_block_with_a_final_norm_does_not_change_what_the_authors_computed(tmp_path):
    state = official_state(LLM)
    whole = import_official(
        saved(tmp_path / "whole.pth", state),
        tmp_path / "whole.pt",
        preprocessing=PREPROCESSING,
        classes=THREE,
        architecture=LLM,
    )
    (layer,) = whole.block()
    norm = torch.linspace(0.5, 1.5, 64).half()
    save_block(replace(layer, tensors={**layer.tensors, "norm.weight": norm}), tmp_path / "block.safetensors")
    options = {
        "preprocessing": PREPROCESSING,
        "classes": THREE,
        "architecture": LLM,
        "block": tmp_path / "block.safetensors",
    }
    trained = {name: value for name, value in state.items() if ".llama." not in name}
    imported = import_official(saved(tmp_path / "trained.pth", trained), tmp_path / "model.pt", **options)
    assert imported.spec.insert.norm == "ones"
    assert largest_difference(imported, state) < 1e-5
    named = "transformer.llama.norm.weight"
    changed_norm = import_official(
        saved(tmp_path / "norm.pth", trained | {named: norm.float()}), tmp_path / "n.pt", **options
    )
    assert changed_norm.spec.insert.norm == "pretrained"
    assert largest_difference(changed_norm, state | {named: norm.float()}) < 1e-5
    with pytest.raises(UsageError, match="another final norm"):
        import_official(
            saved(tmp_path / "other.pth", trained | {named: norm.float() + 1}), tmp_path / "o.pt", **options
        )


def test_a_checkpoint_that_cannot_be_taken_over_leaves_an_older_one_alone(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"months of work")
    path = saved(tmp_path / "official.pth", changed(NORM, lambda old: old * float("nan"))(official_state(OURS)))
    with pytest.raises(ArtefactError, match="not finite"):
        import_official(path, tmp_path / "model.pt", preprocessing=PREPROCESSING, classes=THREE, architecture=OURS)
    assert (tmp_path / "model.pt").read_bytes() == b"months of work"


def renamed(prefix, inside=""):
    def rename(state):
        return {
            prefix + name.replace("transformer.", f"transformer.{inside}", 1): value for name, value in state.items()
        }

    return rename


FORMS = {  # how people save a network, with what may lie beside it
    "DataParallel": renamed("module."),
    "torch.compile": renamed("_orig_mod."),
    "a compiled DataParallel": renamed("_orig_mod.module."),
    "DataParallel of a compiled network": renamed("module._orig_mod."),
    "a compiled part": renamed("model.", "_orig_mod."),
    "Lightning": lambda state: {
        "state_dict": renamed("model.")(state),
        "epoch": 9,
        "optimizer_states": [{"state": {}}],
        "best": torch.ones(()),
    },
    "PyTorch's tutorial": lambda state: {
        "epoch": 149,
        "model_state_dict": state,
        "optimizer_state_dict": {"state": {}},
        "loss": torch.ones(1),
    },
    "net": lambda state: {"net": state, "epoch": 3, "acc": 0.9},
    "model": lambda state: {"model": renamed("module.")(state), "args": {"lr": 0.1}},
    "network.": renamed("network."),
    "state_dict in model": lambda state: {"model": {"state_dict": state}},
    "an epoch among the weights": lambda state: state | {"epoch": 3, "optimizer": {"state": {}}},
}


@pytest.mark.parametrize("form", FORMS)
def test_official_weights_are_found_in_every_save_format(tmp_path, form):
    state = official_state(OURS)
    torch.save(FORMS[form](state), tmp_path / "official.pth")
    imported = import_official(
        tmp_path / "official.pth", tmp_path / "model.pt", preprocessing=PREPROCESSING, classes=THREE, architecture=OURS
    )
    assert largest_difference(imported, state) < 1e-5  # as above: another order of float32 sums


def test_import_logs_entries_beside_the_weights(tmp_path, caplog):
    caplog.set_level("INFO", "medseg_trt")
    torch.save({"net": official_state(OURS), "net_ema": {}, "epoch": 3}, tmp_path / "official.pth")
    read_state(tmp_path / "official.pth")
    assert "the weights are those under net; left out: net_ema, epoch" in caplog.text


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda state: {"model": state, "state_dict": state}, "weights under state_dict and model; save one"),
        (
            lambda state: {"net": without(NORM)(state), NORM: state[NORM]},
            "weights under net and transformer.encoder.encoder_norm.weight; save one",
        ),
        (lambda state: {"net": state | {"decoder.extra": 3}}, r"decoder\.extra is no plain tensor"),
        (lambda state: {"epoch": 3, "optimizer": {"state": {}}}, "holds no named tensors"),
        (lambda state: [state], "holds no named tensors"),
        (lambda state: {"model": {"model": {"model": {"model": {"model": state}}}}}, "holds no named tensors"),
    ],
)
def test_weights_that_cannot_be_told_apart_are_refused(tmp_path, form, message):
    torch.save(form(official_state(OURS)), tmp_path / "official.pth")
    with pytest.raises(ArtefactError, match=message):
        read_state(tmp_path / "official.pth")


@pytest.mark.parametrize("skips", [0, 1, 2])
def test_a_network_with_fewer_skip_connections_is_named_as_such(tmp_path, skips):
    """TransUNet's DecoderCup gives the stages from ``n_skip`` on no channels of the encoder's."""
    state = official_state(OURS)
    widths = [state[f"decoder.blocks.{stage}.conv2.0.weight"].shape[0] for stage in range(4)]
    bridge = state["decoder.conv_more.0.weight"].shape[0]
    for stage in range(skips, 3):
        name = f"decoder.blocks.{stage}.conv1.0.weight"
        state[name] = state[name][:, : (bridge, *widths)[stage]].clone()
    path = saved(tmp_path / "official.pth", state)
    with pytest.raises(ArtefactError, match=r"other skip connections \(n_skip of .*only n_skip = 3") as caught:
        import_official(path, tmp_path / "model.pt", preprocessing=PREPROCESSING, classes=THREE, architecture=OURS)
    assert f"decoder.blocks.{skips}.conv1.0.weight" in str(caught.value)
    assert "--image-size" not in str(caught.value)


def test_a_file_of_the_format_before_pytorch_1_6_is_read(tmp_path):
    state = official_state(OURS)
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    imported = import_official(
        tmp_path / "old.pth", tmp_path / "model.pt", preprocessing=PREPROCESSING, classes=THREE, architecture=OURS
    )
    assert largest_difference(imported, state) < 1e-5


HEAD, NORM = "segmentation_head.0.weight", "transformer.encoder.encoder_norm.weight"


def without(name):
    return lambda state: {key: value for key, value in state.items() if key != name}


def changed(name, value):
    return lambda state: state | {name: value(state.get(name))}


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (without(NORM), {}, rf"is no checkpoint of transunet-tiny: 1 missing: {NORM}$"),
        (changed("decoder.extra.weight", lambda _: torch.ones(1)), {}, r"1 unknown: decoder\.extra\.weight$"),
        (changed(NORM, lambda old: old[:-1]), {}, rf"{NORM} is \(47,\), but that of transunet-tiny is \(48,\)"),
        (changed(NORM, lambda old: old * float("nan")), {}, "not finite"),
        (without(HEAD), {}, f"has no {HEAD} with 4 axes"),
        (changed(HEAD, lambda old: old[0]), {}, f"has no {HEAD} with 4 axes"),
        (changed(NORM, lambda _: "text"), {}, "is no plain tensor"),
        (
            lambda state: state,
            {"classes": Classes(names=("background", "a", "b", "c"))},
            r"answers with 3 logit\(s\), but 4 classes need 4",
        ),
        (lambda state: state, {"image_size": (64, 64)}, "trained with 4 tokens, but 64 x 64 pixels have 16"),
        (lambda state: state, {"image_size": (30, 30)}, "multiple of 16"),
        (lambda state: state, {"architecture": LLM}, "holds no language insert"),
        (lambda state: state, {"architecture": None}, "is no checkpoint of transunet: .* missing: "),
        (lambda state: {}, {}, "holds no named tensors"),
        (lambda state: state | {f"module.{NORM}": state[NORM]}, {}, "holds a tensor twice"),
    ],
)
def test_import_refuses_mismatched_official_weights_and_writes_nothing(tmp_path, damage, options, message):
    path = saved(tmp_path / "official.pth", damage(official_state(OURS)))
    arguments = {"preprocessing": PREPROCESSING, "classes": THREE, "architecture": OURS, **options}
    with pytest.raises(MedsegError, match=message) as caught:
        import_official(path, tmp_path / "out" / "model.pt", **arguments)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_part_of_a_language_layer_and_one_of_odd_shape_are_refused(tmp_path):
    state = official_state(LLM)
    name = "transformer.llama.layers.0.attention.wk.weight"
    for damage, message in (
        (without(name), r"a part of the language layer only; attention\.wk\.weight is missing"),
        (changed(name, lambda old: old[:, :-2]), "k_proj"),
        (changed(name, lambda old: old[:8]), "num_kv_heads"),
        (changed(name, lambda old: old.flatten()), "another number of axes"),
    ):
        path = saved(tmp_path / "official.pth", damage(state))
        with pytest.raises(ArtefactError, match=message):
            import_official(path, tmp_path / "model.pt", preprocessing=PREPROCESSING, classes=THREE, architecture=LLM)


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        (
            9,
            (
                "background",
                "aorta",
                "gallbladder",
                "kidney_left",
                "kidney_right",
                "liver",
                "pancreas",
                "spleen",
                "stomach",
            ),
        ),
        (4, ("background", "right ventricle", "myocardium", "left ventricle")),
        (1, ("background", "lesion")),
        (3, ("background", "class 1", "class 2")),
    ],
)
def test_classes_without_names_are_those_of_the_authors_data_or_numbers(tmp_path, classes, names):
    path = saved(tmp_path / "official.pth", official_state(OURS, classes=classes))
    imported = import_official(path, tmp_path / "model.pt", preprocessing=PREPROCESSING, architecture=OURS)
    assert imported.classes.names == names


class Hostile:
    def __reduce__(self):
        return (print, ("code was run",))


def test_code_in_a_checkpoint_is_not_run(tmp_path, capsys):
    torch.save({"a": Hostile()}, tmp_path / "evil.pth")
    with pytest.raises(ArtefactError, match="other things than tensors"):
        read_state(tmp_path / "evil.pth")
    assert "code was run" not in capsys.readouterr().out
    (tmp_path / "cut.pth").write_bytes((tmp_path / "evil.pth").read_bytes()[:200])
    with pytest.raises(ArtefactError, match=r"cut\.pth is damaged"):
        read_state(tmp_path / "cut.pth")
    (tmp_path / "R50+ViT-B_16.npz").write_bytes(b"PK")
    with pytest.raises(UsageError, match="train --weights"):
        read_state(tmp_path / "R50+ViT-B_16.npz")


def keys_of(title):
    text = (Path(__file__).parent / "official_keys.txt").read_text(encoding="utf-8")
    (block,) = (part for part in text.split("\n[")[1:] if part.startswith(title))
    return {name: tuple(json.loads(shape)) for name, shape in (line.split(" ", 1) for line in block.splitlines()[1:])}


@pytest.mark.parametrize(
    ("title", "architecture", "rules", "count"),
    [
        ("Beckschen/TransUNet", "transunet", TRANSUNET, 409),
        ("juntaoJianggavin/LLM4MedSeg", "llm-transunet", LLM4MEDSEG, 421),
    ],
)
def test_official_weight_names_and_shapes_match_the_full_size_model(title, architecture, rules, count):
    with torch.device("meta"):
        ours = build_model(model_spec(architecture, (256, 256), 1)).state_dict()
    sources = names_elsewhere(rules, ours)
    shapes = {source.name: tuple(ours[name].shape) for name, source in sources.items()}
    assert len(shapes) == count
    assert shapes == keys_of(title)


def test_the_command_writes_a_checkpoint_that_the_others_take(tmp_path):
    path = saved(tmp_path / "official.pth", official_state(OURS))
    options = ["--architecture", OURS, "--classes", "background, disc,bar", "--recipe", "synapse", "--json"]
    ran = CliRunner().invoke(cli, ["import", str(path), "-o", str(tmp_path / "model.pt"), *options])
    assert ran.exit_code == 0, ran.output
    reported = json.loads(ran.stdout)
    assert reported["classes"] == ["background", "disc", "bar"]
    assert (reported["image_size"], reported["preprocessing"]["resize"]) == ([32, 32], "spline3")
    assert CliRunner().invoke(cli, ["inspect", str(tmp_path / "model.pt")]).exit_code == 0
    for wrong, message in (
        (["--classes", "a,a,b"], "--classes: two classes"),
        (["--image-size", "big"], "HEIGHTxWIDTH"),
        (["--recipe", "brats"], "choose one of"),
    ):
        ran = CliRunner().invoke(cli, ["import", str(path), "--architecture", OURS, *wrong])
        assert isinstance(ran.exception, UsageError)
        assert message in str(ran.exception)
