"""Standard names in a trace: what is read and written is the model's own value of that meaning."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.tiny_models import make
from tests.tracing.test_deferred import hand_overs
from tracekit import LanguageModel
from tracekit.errors import MisfitError, MissingNameError, UnknownModuleError

pytestmark = pytest.mark.usefixtures("without_gradients")


def test_names_stand_for_the_modules_of_either_family() -> None:
    for name, attn, o in (("gpt2", "attn", "c_proj"), ("llama", "self_attn", "o_proj")):
        net, _ = make(name)
        model = LanguageModel(net)
        layer = model.layers[1]
        assert layer.attn.path == f"{layer.path}.{attn}"
        assert layer.attn.o.module is getattr(getattr(layer.module, attn), o)
        assert model.get("layers.1.mlp.down") == layer.mlp.down
        assert model.unembed.module is net.lm_head


def test_the_residual_stream_adds_up() -> None:
    net, inputs = make("llama")
    model = LanguageModel(net)
    with model.trace(**inputs):
        pre = model.layers[0].resid_pre
        attn = model.layers[0].attn_out
        mid = model.layers[0].resid_mid
        mlp = model.layers[0].mlp_out
        post = model.layers[0].resid_post
        after = model.layers[1].resid_pre
    assert torch.equal(pre + attn, mid)
    assert torch.equal(mid + mlp, post)
    assert torch.equal(post, after)


def test_a_write_in_the_middle_of_a_block_goes_on_in_the_residual_stream() -> None:
    net, inputs = make("gpt2")
    model = LanguageModel(net)
    added = torch.randn(32)
    with model.trace(**inputs):
        before = model.layers[0].resid_mid.clone()
        model.layers[0].resid_mid = before + added
        mlp = model.layers[0].mlp_out
        post = model.layers[0].resid_post
    torch.testing.assert_close(post, before + added + mlp)


def test_what_the_mlp_reads_is_changed_for_it_alone() -> None:
    net, inputs = make("gpt2")
    model = LanguageModel(net)
    with model.trace(**inputs):
        mid = model.layers[0].resid_mid.clone()
        model.layers[0].mlp_in[:, 2] = 0
        mlp = model.layers[0].mlp_out
        post = model.layers[0].resid_post
    assert torch.equal(mid + mlp, post)
    block = net.transformer.h[0]
    changed = mid.clone()
    changed[:, 2] = 0
    torch.testing.assert_close(mlp, block.mlp(block.ln_2(changed)))


def test_the_queries_of_one_head_are_edited_in_place() -> None:
    net, inputs = make("gpt2")
    model = LanguageModel(net)
    with model.trace(**inputs):
        model.layers[0].q[:, :, 1] = 7
        fused = model.transformer.h[0].attn.c_attn.output
    assert (fused[..., 8:16] == 7).all()
    assert not (fused[..., :8] == 7).any()


def test_what_is_not_there_says_why() -> None:
    net, inputs = make("gpt2")
    model = LanguageModel(net)
    with pytest.raises(MissingNameError, match="no 'cross_z': there is no module"):
        with model.trace(**inputs):
            model.layers[0].cross_z
    with pytest.raises(UnknownModuleError, match="did you mean 'resid_mid'"):
        with model.trace(**inputs):
            model.layers[0].resid_mit
    with pytest.raises(MisfitError, match="q was Tensor"):
        with model.trace(**inputs):
            model.layers[0].q = torch.zeros(3)


def test_stored_reads_by_name_need_no_hand_over(monkeypatch: pytest.MonkeyPatch) -> None:
    net, inputs = make("llama")
    model = LanguageModel(net)
    for _ in range(2):  # by requests, and by hooks alone
        with hand_overs(monkeypatch) as resumed, model.trace(**inputs):
            last = model.layers[0].mlp_out[:, -1]
            stream = [layer.resid_post for layer in model.layers]
            final = model.final_norm.output
        assert resumed == []
        with model.trace(**inputs):
            mlp = model.model.layers[0].mlp.output[:, -1].clone()
            expected = [layer.output.clone() for layer in model.model.layers]
        assert all(map(torch.equal, stream, expected))
        assert torch.equal(last, mlp)
        assert torch.equal(net.model.norm(stream[-1]), final)


def test_an_attribute_that_only_has_the_name_of_a_value_is_left_alone() -> None:
    net, inputs = make("llama")
    model = LanguageModel(net)
    chosen = SimpleNamespace(k=0, pattern=[1])
    with model.trace(**inputs):
        one = model.layers[chosen.k].resid_post
        other = model.layers[chosen.pattern[0]].resid_post
    with model.trace(**inputs):
        expected = [layer.output.clone() for layer in model.model.layers]
    assert torch.equal(one, expected[0])
    assert torch.equal(other, expected[1])


def test_heads_that_the_projections_do_not_have_are_not_handed_out() -> None:
    net, inputs = make("llama")
    net.config.num_attention_heads = 5  # of another checkpoint than the weights
    model = LanguageModel(net)
    with pytest.raises(MissingNameError, match=r"q_proj has 32 features, which 5 heads can't"):
        with model.trace(**inputs):
            model.layers[0].q
    with model.trace(**inputs):
        stream = model.layers[0].resid_post
    assert stream.shape == (2, 8, 32)


def test_heads_of_different_widths_are_not_handed_out() -> None:
    net, inputs = make("llama")
    net.config.num_key_value_heads = 4
    model = LanguageModel(net)
    with pytest.raises(MissingNameError, match="heads of different widths"):
        with model.trace(**inputs):
            model.layers[0].k
