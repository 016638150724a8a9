"""Where a standard name could mean the wrong value in an encoder: each against plain hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.architectures.stirred import stirred
from tests.matrix import relatives
from tests.matrix.spec import IMAGE_TOKEN
from tests.tiny_models import IS_TRANSFORMERS_5, make
from tracekit import LanguageModel, Model
from tracekit.architectures import names_of
from tracekit.architectures.check import prove
from tracekit.errors import MissingNameError

pytestmark = pytest.mark.usefixtures("without_gradients")
OF_TRANSFORMERS_5 = {"llava_qwen2", "smolvlm", "qwen2_vl", "deit"}


def seen_by_hooks(net: nn.Module, inputs: dict[str, Any], *paths: str) -> list[list[Any]]:
    """For each module, of every call of it: what it was called with, and what it gave."""
    found: list[list[Any]] = [[] for _ in paths]
    handles = []
    for place, path in enumerate(paths):

        def note(_: nn.Module, args: Any, kwargs: Any, output: Any, place: int = place) -> None:
            given = [*args, *kwargs.values()]
            found[place].append((given, output[0] if isinstance(output, tuple) else output))

        handles.append(net.get_submodule(path).register_forward_hook(note, with_kwargs=True))
    net(**inputs)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", sorted(relatives.SPECS))
def test_the_names_of_a_relative_are_proved(name: str) -> None:
    if not IS_TRANSFORMERS_5 and name in OF_TRANSFORMERS_5:
        pytest.skip("configured otherwise before transformers 5")
    net, inputs = make(name)
    names = names_of(stirred(net))
    assert names is not None
    few = len(names.stacks.get("layers", ())) < 5  # each write is one more run
    proof = prove(names, lambda: net(**inputs), with_writes=few)
    assert proof, "\n".join(map(str, proof.failed))


def test_bert_adds_what_its_dense_layers_give_and_norms_the_sum() -> None:
    net, inputs = make("bert")
    model = Model(net)
    with model.trace(**inputs):
        pre = model.layers[0].resid_pre
        attn = model.layers[0].attn_out
        mid = model.layers[0].resid_mid
        mlp = model.layers[0].mlp_out
        post = model.layers[0].resid_post
    layer = net.bert.encoder.layer[0]
    paths = ("attention.output.dense", "attention.output.LayerNorm", "output.dense")
    dense, norm, down = seen_by_hooks(net, inputs, *(f"bert.encoder.layer.0.{p}" for p in paths))
    assert torch.equal(attn, dense[0][1])
    assert torch.equal(mid, norm[0][1])
    assert torch.equal(mlp, down[0][1])
    torch.testing.assert_close(mid, layer.attention.output.LayerNorm(pre + attn))
    torch.testing.assert_close(post, layer.output.LayerNorm(mid + mlp))


def test_what_attention_of_bert_reads_is_changed_for_it_alone() -> None:
    net, inputs = make("bert")
    model = Model(net)
    with model.trace(**inputs):
        pre = model.layers[0].resid_pre.clone()
        model.layers[0].attn_in[:] = 0
        q = model.layers[0].q
        attn = model.layers[0].attn_out
        mid = model.layers[0].resid_mid
    layer = net.bert.encoder.layer[0].attention
    torch.testing.assert_close(q.flatten(-2), layer.self.query.bias.expand_as(pre))
    torch.testing.assert_close(mid, layer.output.LayerNorm(pre + attn))


def test_the_layers_of_albert_are_the_calls_of_its_few() -> None:
    net, inputs = make("albert_groups")
    model = Model(net)
    assert len(model.layers) == 8
    with model.trace(**inputs):
        third = model.layers[2].resid_post
        fourth = model.layers[3].resid_post
        last = model.layers[7].resid_post
    groups = "albert.encoder.albert_layer_groups"
    one, two, end = seen_by_hooks(
        net, inputs, *(f"{groups}.{p}" for p in ("0.albert_layers.0", "0.albert_layers.1")),
        f"{groups}.1.albert_layers.1",
    )  # fmt: skip
    assert torch.equal(third, one[1][1])
    assert torch.equal(fourth, two[1][1])
    assert torch.equal(last, end[1][1])


def test_a_write_to_one_call_of_alberts_layer_is_no_write_to_another() -> None:
    net, inputs = make("albert")
    model = Model(net)
    with model.trace(**inputs):
        model.layers[0].resid_mid  # calls are counted from the first that is asked for
        first = model.layers[0].mlp_out
        mid = model.layers[1].resid_mid
        model.layers[1].mlp_out[:] = 0
        post = model.layers[1].resid_post
    norm = net.albert.encoder.albert_layer_groups[0].albert_layers[0].full_layer_layer_norm
    torch.testing.assert_close(post, norm(mid))
    assert not (first == 0).all()


def test_what_albert_can_not_change_for_attention_alone_it_says() -> None:
    net, inputs = make("albert")
    model = Model(net)
    with pytest.raises(MissingNameError, match="write q, k and v for attention alone"):
        with model.trace(**inputs):
            model.layers[0].attn_in


def test_cross_attention_of_t5_stands_between_attention_and_mlp() -> None:
    net, inputs = make("t5")
    model = Model(net)
    with model.trace(**inputs):
        read = model.encoder_out
        pre = model.layers[1].resid_pre
        attn = model.layers[1].attn_out
        cross = model.layers[1].resid_cross
        q = model.layers[1].cross_q
        added = model.layers[1].cross_attn_out
        mid = model.layers[1].resid_mid
    torch.testing.assert_close(cross, pre + attn)
    torch.testing.assert_close(mid, cross + added)
    sublayer = net.decoder.block[1].layer[1]
    projected = sublayer.EncDecAttention.q(sublayer.layer_norm(cross))
    torch.testing.assert_close(q.flatten(-2), projected)
    assert torch.equal(read, net.encoder(inputs["input_ids"], inputs["attention_mask"])[0])


def test_the_layer_of_t5_that_has_relative_positions_has_them_by_name() -> None:
    net, _ = make("t5")
    model = Model(net)
    bias = net.decoder.block[0].layer[0].SelfAttention.relative_attention_bias
    assert model.layers[0].attn.rel_pos.module is bias
    assert "rel_pos" not in dir(model.layers[1].attn)


def test_the_embedding_that_is_named_is_the_decoders() -> None:
    net, inputs = make("t5")
    model = Model(net)
    with model.trace(**inputs):
        embedded = model.embed_out
        pre = model.layers[0].resid_pre
    assert torch.equal(embedded, net.shared(inputs["decoder_input_ids"]))
    assert torch.equal(embedded, pre)


def test_what_dinov2_adds_is_scaled() -> None:
    net, inputs = make("dinov2")
    model = Model(net)
    with model.trace(**inputs):
        pre = model.layers[1].resid_pre
        attn = model.layers[1].attn_out
        mid = model.layers[1].resid_mid
    (given,) = seen_by_hooks(net, inputs, "encoder.layer.1.attention")
    torch.testing.assert_close(attn, given[0][1] * 0.5)
    torch.testing.assert_close(mid, pre + attn)


def test_the_encoder_of_whisper_stands_beside_its_decoder() -> None:
    net, inputs = make("whisper")
    model = Model(net)
    assert model.layers[0].module is net.model.decoder.layers[0]
    assert model.encoder_layers[0].module is net.model.encoder.layers[0]
    with model.trace(**inputs):
        heard = model.encoder_layers[1].resid_post
        read = model.encoder_out
        q = model.layers[0].q
        cross = model.layers[0].cross_z
    torch.testing.assert_close(read, net.model.encoder.layer_norm(heard))
    assert q.shape == (2, 4, 4, 8)
    assert cross.shape == (2, 4, 4, 8)


def test_parts_that_no_module_is_around_are_the_layers_own() -> None:
    net, _ = make("bart")
    model = Model(net)
    layer = net.model.decoder.layers[0]
    assert model.layers[0].up.module is layer.fc1
    assert model.layers[0].attn.o.module is layer.self_attn.out_proj
    assert model.layers[0].cross_attn.cross_q.module is layer.encoder_attn.q_proj


def text_model_is_given(net: nn.Module, inputs: dict[str, Any], path: str) -> Tensor:
    """What stands at the positions of images in front of the first layer of the text model."""
    (first,) = seen_by_hooks(net, inputs, path)
    return first[0][0][0][inputs["input_ids"] == IMAGE_TOKEN]


@pytest.mark.skipif(not IS_TRANSFORMERS_5, reason="configured otherwise before transformers 5")
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "qwen3_vl"])
def test_the_text_model_is_given_the_image_features(name: str) -> None:
    net, inputs = make(name)
    model = LanguageModel(net)
    with model.trace(**inputs):
        features = model.image_features.clone()
        model.image_features[1] = 7
        given = model.layers[0].resid_pre
    at = inputs["input_ids"] == IMAGE_TOKEN
    path = "model.language_model.layers.0"
    assert torch.equal(features, text_model_is_given(net, inputs, path))
    changed = features.clone()
    changed[1] = 7
    assert torch.equal(given[at], changed)


@pytest.mark.skipif(not IS_TRANSFORMERS_5, reason="configured otherwise before transformers 5")
def test_a_text_model_keeps_its_familys_names_inside_a_larger_one() -> None:
    net, inputs = make("llava")
    model = LanguageModel(net)
    assert model.layers[0].mlp.gate.module is net.model.language_model.layers[0].mlp.gate_proj
    assert model.vision_layers[0].mlp.up.module is net.model.vision_tower.encoder.layers[0].mlp.fc1
    with model.trace(**inputs):
        heads = model.vision_layers[0].z
        text = model.layers[0].z
    assert heads.shape == (1, 5, 4, 8)
    assert text.shape[1] == inputs["input_ids"].shape[1]


@pytest.mark.skipif(not IS_TRANSFORMERS_5, reason="configured otherwise before transformers 5")
def test_patches_of_qwen_vl_are_in_one_row() -> None:
    net, inputs = make("qwen2_5_vl")
    model = LanguageModel(net)
    with model.trace(**inputs):
        v = model.vision_layers[0].v
        post = model.vision_layers[0].resid_post
    assert v.shape == (16, 4, 8)
    assert post.shape == (16, 32)
    names = names_of(net)
    assert names is not None
    point = names.point("model.visual.blocks.0", "v")
    assert point is not None
    assert point.shape == "batch*pos kv_heads head_dim"


def test_channels_that_come_first_are_read_and_written_last() -> None:
    net, inputs = make("convnext")
    model = Model(net)
    with model.trace(**inputs):
        pre = model.layers[1].resid_pre
        model.layers[1].mlp_out[:, 3] = 0
        post = model.layers[1].resid_post
        raw = model.layers[1].output
    assert pre.shape == (2, 16, 16)
    assert torch.equal(post[:, 3], pre[:, 3])
    assert not torch.equal(post[:, 2], pre[:, 2])
    assert torch.equal(post, raw.flatten(2).transpose(1, 2))


def test_what_attention_of_swin_adds_lies_in_the_picture_again() -> None:
    net, inputs = make("swin")
    model = Model(net)
    with model.trace(**inputs):
        pre = model.layers[2].resid_pre
        q = model.layers[2].q
        attn = model.layers[2].attn_out
        mid = model.layers[2].resid_mid
    torch.testing.assert_close(mid, pre + attn)
    assert pre.shape == (2, 16, 16)
    assert q.shape == (8, 4, 4, 4)  # four windows of four patches, in each of two pictures


def test_the_order_of_norms_in_wav2vec2_follows_its_configuration() -> None:
    for name, is_behind in (("wav2vec2", True), ("wav2vec2_stable", False)):
        net, inputs = make(name)
        model = Model(net)
        norm = net.wav2vec2.encoder.layers[0].layer_norm
        assert ("final_norm" in dir(model)) is not is_behind
        assert ("embed_norm" in dir(model)) is is_behind
        with model.trace(**inputs):
            pre = model.layers[0].resid_pre
            attn = model.layers[0].attn_out
            mid = model.layers[0].resid_mid
        torch.testing.assert_close(mid, norm(pre + attn) if is_behind else pre + attn)
