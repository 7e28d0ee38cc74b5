"""timm's re-parameterized blocks fold exactly, in any precision, into what timm itself folds them to."""

import copy
import functools

import pytest
import torch
from torch import nn

import foldconv
from foldconv.algebra.norms import is_norm

timm = pytest.importorskip("timm")
from timm.models import byobnet, fastvit, ghostnet, lcnetv2, nextvit, repghost, repvit  # noqa: E402

GHOST = [[[3, 8, 16, 0, 1]], [[3, 24, 24, 0, 2]], [[5, 36, 40, 0.25, 2]]]
FOUR = {"depths": (1, 1, 1, 1)}


def byob(kind, attn=None, **options):
    """Two stages of a kind of block, the first of groups of one channel."""
    stages = tuple(
        byobnet.ByoBlockCfg(type=kind, d=2, c=c, s=2, gs=g, block_kwargs=options) for c, g in ((8, 1), (16, 0))
    )
    return byobnet.ByobNet(byobnet.ByoModelCfg(stages, stem_type=kind, stem_chs=8, attn_layer=attn), num_classes=5)


def small(name, **options):
    return timm.create_model(name, num_classes=5, **options)


def next_vit():
    return nn.Sequential(
        nextvit.NextConvBlock(3, 32, head_dim=8), nextvit.NextTransformerBlock(32, 128, 0.1, 2, sr_ratio=2, head_dim=8)
    )


# How to build it, and how many norms stand outside of blocks (timm leaves them, too).
NETWORKS = {
    "RepVGG": (lambda: byob("rep"), 0),
    "RepVGG-D2se": (lambda: byob("rep", "se"), 0),
    "MobileOne": (lambda: byob("one", num_conv_branches=3), 0),
    "FastViT": (lambda: small("fastvit_sa12", layers=(1, 1, 1, 1), embed_dims=(8, 16, 32, 32)), 5),
    "RepViT": (lambda: small("repvit_m0_9", embed_dim=(16, 16), depth=(1, 1)), 0),
    "RepViT, legacy": (lambda: small("repvit_m1", embed_dim=(16, 16), depth=(1, 1)), 0),
    "RepGhost": (lambda: repghost.RepGhostNet(GHOST, num_classes=5, width=0.5), 14),
    "GhostNetV3": (lambda: ghostnet.GhostNet(GHOST, num_classes=5, width=0.5, version="v3"), 9),
    "LeViT": (
        lambda: small("levit_128s", img_size=64, embed_dim=(16, 24), key_dim=8, num_heads=(1, 1), depth=(1, 1)),
        0,
    ),
    "LeViT, convolutions": (
        lambda: small("levit_conv_128s", img_size=64, embed_dim=(16, 24), key_dim=8, num_heads=(1, 1), depth=(1, 1)),
        0,
    ),
    "TinyViT": (
        lambda: small("tiny_vit_5m_224", embed_dims=(8, 16), num_heads=(1, 1), depths=(1, 1), window_sizes=(2, 2)),
        0,
    ),
    "EfficientViT-MSRA": (
        lambda: small(
            "efficientvit_m0",
            img_size=64,
            embed_dim=(16, 16),
            key_dim=(4, 4),
            depth=(1, 1),
            num_heads=(1, 1),
            window_size=(2, 2),
        ),
        0,
    ),
    "SHViT": (
        lambda: small(
            "shvit_s1", embed_dim=(16, 16), partial_dim=(8, 8), depth=(1, 1), qk_dim=(4, 4), types=("i", "s")
        ),
        0,
    ),
    "iFormer": (lambda: small("iformer_t", dims=(8, 16, 16, 16), depths=(1, 1, 3, 1), attn_groups=(0, 0, 1, 0)), 0),
    "iFormer, distilled": (
        lambda: small("iformer_m_distilled", dims=(8,) * 4, depths=(1, 1, 3, 1), attn_groups=(0, 0, 1, 0)),
        0,
    ),
    "EfficientViM": (lambda: small("efficientvim_m1", embed_dim=(16,) * 3, depths=(1,) * 3, state_dim=(4,) * 3), 0),
    "PP-LCNetV2": (lambda: lcnetv2.LCNetV2(0.125, (1, 1, 2, 1), head_hidden_size=16, num_classes=5), 12),
    "Next-ViT": (next_vit, 5),
}


def stirred(model, seed=0):
    """The model in evaluation mode, with norms, factors and gates as after some training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if is_norm(module):
                for tensor, low in ((module.running_mean, -0.2), (module.running_var, 0.5), (module.weight, 0.5)):
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + low)
                module.bias.copy_(torch.rand(module.bias.shape, generator=generator) - 0.5)
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] in ("gamma", "alpha"):
                parameter.copy_(torch.rand(parameter.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def outputs(model, x):
    found = model(x)
    return torch.cat([t.flatten() for t in found]) if isinstance(found, tuple) else found


def norms_of(model):
    return [name for name, module in model.named_modules() if is_norm(module)]


def shapes(model):
    return {key: value.shape for key, value in model.state_dict().items()}


X = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_family_folds_exactly_into_what_timm_folds_it_to(name):
    build, left = NETWORKS[name]
    model = stirred(build()).double()
    before = copy.deepcopy(model)
    expected = outputs(before, X)
    folded = foldconv.fold(model, blocks=True)
    assert (outputs(folded, X) - expected).abs().max() <= 1e-9 * expected.abs().max()
    assert len(norms_of(folded)) == left < len(norms_of(model))
    assert {p.dtype for p in folded.parameters()} == {torch.float64}
    # The caller's model is as it was, and the result a network of its own.
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.state_dict().values(), strict=True)
    )
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in folded.parameters()}
    again = foldconv.fold(folded)
    assert [type(m) for m in again.modules()] == [type(m) for m in folded.modules()]
    assert torch.equal(outputs(copy.deepcopy(again), X), outputs(folded, X))
    # timm's walk looks at children only.
    assert shapes(folded) == shapes(timm.utils.reparameterize_model(nn.Sequential(before))[0])


def test_what_was_expanded_folds_back_and_the_blocks_with_the_next_fold():
    one = functools.partial(byobnet.MobileOneBlock, num_conv_branches=2)
    for method, block in (
        ("doconv", byobnet.RepVggBlock),
        ("repvgg", one),
        ("dbb", byobnet.RepVggBlock),
        ("orepa", one),
    ):
        plain = stirred(nn.Sequential(block(3, 8, stride=4), block(8, 8), repvit.ConvNorm(8, 4, 3))).double()
        rich = foldconv.expand(plain, method)
        with torch.no_grad():
            for parameter in rich.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, dtype=torch.float64)
        expected = outputs(rich, X)
        once = foldconv.fold(rich)
        assert shapes(once) == shapes(plain)
        for folded in (foldconv.fold(once), foldconv.fold(rich, blocks=True), foldconv.fold(rich, batchnorm=True)):
            assert norms_of(folded) == []
            assert (outputs(folded, X) - expected).abs().max() <= 1e-9 * expected.abs().max()
            assert shapes(folded) == shapes(foldconv.fold(plain))
        assert shapes(foldconv.fold(plain, blocks=False)) == shapes(plain)


def test_precision_layout_flags_and_hooks_survive():
    model = stirred(nn.Sequential(byobnet.RepVggBlock(3, 8), byobnet.MobileOneBlock(8, 8), fastvit.RepMixer(8)))
    model.to(memory_format=torch.channels_last)
    for dtype in (torch.bfloat16, torch.float16):
        low = copy.deepcopy(model).to(dtype).train()
        exact = foldconv.fold(copy.deepcopy(low).double())
        folded = foldconv.fold(low)
        assert {p.dtype for p in folded.parameters()} == {dtype}
        # Composed in float64 and cast last: no value is further than rounding once.
        assert all(torch.equal(a, b.to(dtype)) for a, b in zip(folded.parameters(), exact.parameters(), strict=True))
        assert all(module.training for module in folded.modules())
        assert folded[0].reparam_conv.weight.is_contiguous(memory_format=torch.channels_last)
    model[0].requires_grad_(False)
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    model[0].note = "mine"
    folded = foldconv.fold(model)
    folded(torch.randn(1, 3, 8, 8))
    assert seen == ["RepVggBlock"]
    assert folded[0].note == "mine"
    assert [p.requires_grad for p in folded.parameters()] == [False, False, True, True, True, True]


def test_a_block_whose_parts_are_watched_or_replaced_is_left(caplog):
    model = stirred(
        nn.Sequential(byobnet.RepVggBlock(3, 8), byobnet.RepVggBlock(8, 8), byobnet.RepVggBlock(8, 8))
    ).double()
    model[0].conv_kxk.register_forward_hook(lambda module, args, output: 2 * output)
    model[1].forward = lambda x: x + 1
    expected = outputs(model, X)
    folded = foldconv.fold(model)
    assert torch.allclose(outputs(folded, X), expected, rtol=1e-10)
    assert [name for name in norms_of(folded) if name[0] == "2"] == []
    assert len(norms_of(folded)) == 5
    assert "0: conv_kxk in it has a hook" in caplog.text
    assert "1: the forward of timm" in caplog.text
    with pytest.raises(foldconv.UnsupportedError, match=r"^0: conv_kxk in it has a hook or another forward"):
        foldconv.fold(model, blocks=True)


def test_a_block_that_computes_something_else_is_refused(monkeypatch, caplog):
    model = stirred(nn.Sequential(byobnet.RepVggBlock(3, 8))).double()
    own = byobnet.RepVggBlock.forward
    monkeypatch.setattr(byobnet.RepVggBlock, "forward", lambda self, x: own(self, x) + (self.reparam_conv is None))
    assert norms_of(foldconv.fold(model)) == norms_of(model)
    assert "0: the fold of timm.models.byobnet.RepVggBlock differs from the block: expected at most" in caplog.text
    with pytest.raises(foldconv.FoldMismatchError, match=r"^0: the fold of timm\S+ differs .* fold with blocks=False$"):
        foldconv.fold(model, blocks=True)
    with torch.no_grad():
        model[0].conv_1x1.bn.running_mean[0] = float("nan")
    with pytest.raises(foldconv.FoldMismatchError, match="expected a finite reparam_conv"):
        foldconv.fold(model, blocks=True)


def test_in_place_and_put_back_when_something_else_fails():
    model = stirred(nn.Sequential(byobnet.RepVggBlock(3, 8), foldconv.DOConv2d(8, 8, 3))).double()
    first, keys = model[0], list(model.state_dict())
    model[1].forward = lambda x: x
    with pytest.raises(foldconv.UnsupportedError, match="1: its forward was replaced"):
        foldconv.fold(model, blocks=True, inplace=True)
    assert model[0] is first
    assert list(model.state_dict()) == keys
    del model[1].forward
    assert foldconv.fold(model, blocks=True, inplace=True) is model
    assert list(model.state_dict()) == [
        f"{name}.{part}" for name in ("0.reparam_conv", "1") for part in ("weight", "bias")
    ]


def test_a_shared_block_stays_shared_and_a_root_is_replaced():
    block = stirred(byobnet.RepVggBlock(8, 8)).double()
    model = nn.ModuleDict({"a": block, "b": nn.Sequential(block)})
    folded = foldconv.fold(model)
    assert folded["a"] is folded["b"][0]
    assert folded["a"].reparam_conv is not None
    conv = foldconv.fold(stirred(repvit.ConvNorm(3, 4, 3)).double())
    assert type(conv) is nn.Conv2d
    assert conv.weight.dtype == torch.float64
