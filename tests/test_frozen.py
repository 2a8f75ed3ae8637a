"""The frozen layers and towers against the library's own, over precisions and odd shapes."""

import copy
from typing import Any

import open_clip
import pytest
import torch
from open_clip.transformer import QuickGELU
from promptkd import frozen
from promptkd.attention import FrozenAttention
from promptkd.blocks import freeze
from promptkd.errors import ModelError
from promptkd.frozen import FrozenLinear, FrozenPatches, FrozenQuickGelu, packs
from promptkd.text_tower import TextTower
from promptkd.towers import VisionTower
from torch import Tensor, nn
from torch.nn import functional as F

# Largest difference allowed, as a share of the largest value.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 5e-2}
DTYPES = list(TOLERANCES)
ODD, IN, OUT = (3, 37), 65, 41


def close(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    assert ours.shape == theirs.shape
    scale = float(theirs.abs().max())
    assert scale > 0
    worst = float((ours.double() - theirs.double()).abs().max())
    assert worst <= TOLERANCES[dtype] * scale, f"off by {worst / scale:.2e} of the largest value"


@pytest.fixture(params=[True, False], ids=["packed", "plain"])
def packing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways through a linear layer, whatever this processor would choose."""
    if request.param and not packs(torch.bfloat16):
        pytest.skip("this torch or processor has no packed weights")
    monkeypatch.setattr(frozen, "packs", lambda dtype: request.param and dtype != torch.float64)
    return request.param


def both_gradients(
    ours: Any, theirs: Any, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Outputs and input gradients of two functions of one tensor."""
    x = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    y = x.detach().clone().requires_grad_()
    mine, other = ours(x), theirs(y)
    close(mine.detach(), other.detach(), dtype)
    grad = torch.randn(mine.shape, generator=generator).to(dtype)
    mine.backward(grad)
    other.backward(grad)
    assert x.grad is not None
    assert y.grad is not None
    close(x.grad, y.grad, dtype)
    with torch.inference_mode():
        close(ours(x.detach()), other.detach(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_linear(
    packing: bool, dtype: torch.dtype, has_bias: bool, generator: torch.Generator
) -> None:
    weight = torch.randn(OUT, IN, generator=generator).to(dtype)
    bias = torch.randn(OUT, generator=generator).to(dtype) if has_bias else None
    layer = FrozenLinear(weight, bias)
    both_gradients(layer, lambda x: F.linear(x, weight, bias), (*ODD, IN), dtype, generator)
    some = slice(5, 18)
    rows = None if bias is None else bias[some]
    both_gradients(
        lambda x: layer(x, 5, 18),
        lambda x: F.linear(x, weight[some], rows),
        (*ODD, IN),
        dtype,
        generator,
    )
    assert layer(torch.zeros(0, 3, IN, dtype=dtype)).shape == (0, 3, OUT)
    strided = torch.randn(3, 37, 2, IN, generator=generator).to(dtype)[:, :, 1].requires_grad_()
    y = layer(strided)
    close(y.detach(), F.linear(strided.detach(), weight, bias), dtype)
    y.sum().backward()  # an expanded gradient
    assert strided.grad is not None
    close(strided.grad, weight.sum(dim=0).expand_as(strided), dtype)


def test_packed_weights_are_in_use() -> None:
    """Where they pay, a float32 layer does not go through F.linear."""
    layer = FrozenLinear(torch.randn(OUT, IN), None)
    layer(torch.randn(16, IN))
    assert bool(layer._packs) is packs(torch.float32)
    assert not packs(torch.float64)


def test_packed_weights_follow_the_plain_ones(packing: bool, generator: torch.Generator) -> None:
    """Loading, casting, copying and replacing weights after use; the state dict stays plain."""
    weight, other = torch.randn(2, OUT, IN, generator=generator).unbind(0)
    bias, x = torch.zeros(OUT), torch.randn(37, IN, generator=generator)
    layer = FrozenLinear(weight, bias)
    layer(x.clone().requires_grad_()).sum().backward()
    state = layer.state_dict()
    assert list(state) == ["weight", "bias"]
    assert torch.equal(state["weight"], weight)
    twin = copy.deepcopy(layer)
    layer.load_state_dict({"weight": other, "bias": bias + 1})
    close(layer(x), F.linear(x, other, bias + 1), torch.float32)
    close(twin(x), F.linear(x, weight, bias), torch.float32)
    layer.bias = bias
    close(layer(x), F.linear(x, other, bias), torch.float32)
    layer.to(torch.float64)
    close(layer(x.double()), F.linear(x.double(), other.double()), torch.float64)
    layer.to(torch.float32)
    close(layer(x), F.linear(x, other), torch.float32)
    layer.weight = weight
    close(layer(x), F.linear(x, weight), torch.float32)


def test_packed_weights_survive_inference_mode(packing: bool, generator: torch.Generator) -> None:
    """What was packed while only predicting serves a training step too, and the reverse."""
    with torch.inference_mode():
        layer = FrozenLinear(torch.randn(OUT, IN, generator=generator), None)
        layer(torch.randn(37, IN, generator=generator))
    plain = FrozenLinear(layer.weight.clone(), None)
    with torch.inference_mode():
        plain(torch.randn(37, IN, generator=generator))
    weight = plain.weight
    both_gradients(plain, lambda x: F.linear(x, weight), (37, IN), torch.float32, generator)


def test_the_same_bits_every_time(packing: bool, generator: torch.Generator) -> None:
    x = torch.randn(3, 37, IN, generator=generator)
    weight = torch.randn(OUT, IN, generator=generator)
    first, second = FrozenLinear(weight, None), FrozenLinear(weight, None)
    assert torch.equal(first(x), first(x))
    assert torch.equal(first(x), second(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_quick_gelu(dtype: torch.dtype, generator: torch.Generator) -> None:
    both_gradients(FrozenQuickGelu(), QuickGELU(), (*ODD, IN), dtype, generator)


@pytest.mark.parametrize("dtype", DTYPES)
def test_patches(packing: bool, dtype: torch.dtype, generator: torch.Generator) -> None:
    conv = nn.Conv2d(3, OUT, (5, 7), stride=(5, 7), bias=False).to(dtype)
    layer = FrozenPatches(conv.weight, None)
    assert torch.equal(layer.state_dict()["weight"], conv.weight)

    def theirs(x: Tensor) -> Tensor:
        patches: Tensor = conv(x).flatten(2).transpose(1, 2)
        return patches

    both_gradients(layer, theirs, (2, 3, 15, 21), dtype, generator)
    both_gradients(layer, theirs, (2, 3, 17, 25), dtype, generator)  # leaves a rest


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
def test_attention(
    packing: bool, dtype: torch.dtype, masked: bool, generator: torch.Generator
) -> None:
    source = nn.MultiheadAttention(48, 3, batch_first=True).to(dtype)
    nn.init.normal_(source.in_proj_weight, std=0.3, generator=generator)
    nn.init.normal_(source.in_proj_bias, std=0.3, generator=generator)
    ours, length = FrozenAttention(source), 13
    mask = torch.full((length, length), -torch.inf, dtype=dtype).triu(1) if masked else None

    def theirs(x: Tensor) -> Tensor:
        out: Tensor = source(x, x, x, need_weights=False, attn_mask=mask)[0]
        return out

    shape = (3, length, 48)
    both_gradients(lambda x: ours(x, mask=mask), theirs, shape, dtype, generator)
    row = None if mask is None else mask[4:5]
    both_gradients(
        lambda x: ours(x, pick=lambda t: t[:, 4:5], mask=row),
        lambda x: theirs(x)[:, 4:5],
        shape,
        dtype,
        generator,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_to_extra_tokens(
    packing: bool, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Extra tokens are like appended ones whose outcome is dropped, gradients included."""
    ours = FrozenAttention(nn.MultiheadAttention(48, 3, batch_first=True).to(dtype))
    tokens = torch.randn(3, 13, 48, generator=generator).to(dtype)

    def appended(extra: Tensor) -> Tensor:
        out: Tensor = ours(torch.cat([tokens, extra.expand(3, -1, -1)], dim=1))[:, :13]
        return out

    both_gradients(lambda e: ours(tokens, extra=e), appended, (5, 48), dtype, generator)


VISION = {
    "plain": {},
    "quick": {"act_layer": QuickGELU},
    "scaled": {"ls_init_value": 0.3},
    "average": {"pool_type": "avg"},
    "norm last": {"final_ln_after_pool": True, "no_ln_pre": True},
    "average last": {"pool_type": "avg", "final_ln_after_pool": True},
}


def make_vision(**changes: Any) -> nn.Module:
    settings = {
        "image_size": 21,
        "patch_size": 7,
        "width": 48,
        "layers": 4,
        "heads": 3,
        "mlp_ratio": 4.0,
        "output_dim": 29,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        tower = open_clip.transformer.VisionTransformer(**{**settings, **changes})
        for name, parameter in tower.named_parameters():
            if "proj" in name or "c_fc" in name or "conv1" in name:
                nn.init.normal_(parameter, std=0.2)
    return tower.eval()


class HookedVision(nn.Module):
    """The official way: open_clip's own tower, prompts appended and replaced block by block."""

    def __init__(self, tower: Any, prompts: list[Tensor]) -> None:
        super().__init__()
        self.tower, self.prompts = tower, prompts

    def forward(self, images: Tensor) -> Tensor:
        tower, count = self.tower, len(self.prompts[0])
        x = tower.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([tower.class_embedding.expand(len(x), 1, -1), x], 1)
        x = x + tower.positional_embedding
        x = tower.ln_pre(torch.cat([x, self.prompts[0].expand(len(x), -1, -1)], 1))
        for layer, block in enumerate(tower.transformer.resblocks):
            if 0 < layer < len(self.prompts):
                x = torch.cat([x[:, :-count], self.prompts[layer].expand(len(x), -1, -1)], 1)
            x = block(x)
        features: Tensor = tower._pool(x[:, :-count])[0] @ tower.proj
        return features


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", VISION)
def test_vision_tower(
    packing: bool, kind: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    tower = make_vision(**VISION[kind]).to(dtype)
    ours = VisionTower(tower, dtype)
    images = torch.randn(3, 3, 21, 21, generator=generator).to(dtype)
    with torch.no_grad():
        close(ours(images), tower(images), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", VISION)
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_prompted_vision_tower(
    packing: bool, kind: str, depth: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Outputs and prompt gradients at every depth, under the last block and with it."""
    tower = make_vision(**VISION[kind]).to(dtype).requires_grad_(False)
    ours = VisionTower(tower, dtype)
    images = torch.randn(3, 3, 21, 21, generator=generator).to(dtype)

    def theirs(stacked: Tensor) -> Tensor:
        features: Tensor = HookedVision(tower, list(stacked.unbind(0)))(images)
        return features

    both_gradients(
        lambda stacked: ours(images, list(stacked.unbind(0))),
        theirs,
        (depth, 5, 48),
        dtype,
        generator,
    )


def test_only_prompts_have_a_graph(generator: torch.Generator) -> None:
    """Nothing is kept for the pictures, and weights get no gradient."""
    ours = VisionTower(make_vision())
    prompts = [torch.randn(5, 48, generator=generator, requires_grad=True)]
    images = torch.randn(2, 3, 21, 21, generator=generator)
    assert not ours._embed(images).requires_grad
    assert not ours(images).requires_grad
    ours(images, prompts).sum().backward()
    assert prompts[0].grad is not None
    assert not any(p.requires_grad for p in ours.parameters())


def make_text() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        return open_clip.transformer.TextTransformer(
            context_length=16, vocab_size=50, width=48, heads=3, layers=3, output_dim=29
        ).eval()


def make_tokens(shared: int, generator: torch.Generator) -> Tensor:
    """Seven rows of 16 ids that have `shared` in common, with end tokens at several places."""
    tokens = torch.randint(1, 47, (7, 16), generator=generator)
    tokens[:, 0] = 48
    tokens[:, 1:shared] = 7
    if shared < 16:
        tokens[0, shared] = 47
    for row, end in enumerate([8, 9, 13, 13, 10, 11, 8]):
        tokens[row, end + 1 :] = 0
        tokens[row, end] = 49
    return tokens


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shared", [1, 5, 8])
def test_text_tower(
    packing: bool, shared: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    text = make_text().to(dtype)
    tokens = make_tokens(shared, generator)
    ours = TextTower(text, dtype)
    with torch.no_grad():
        theirs = text(tokens)
        close(ours(tokens), theirs, dtype)
        close(ours(ours.cut(tokens)), theirs, dtype)
        close(ours(tokens[2:3]), theirs[2:3], dtype)


class HookedText(nn.Module):
    """The official way: whole sentences, context tokens replaced block by block."""

    def __init__(self, text: Any) -> None:
        super().__init__()
        self.text = text

    def forward(self, tokens: Tensor, prompts: Tensor) -> Tensor:
        text, count = self.text, prompts.shape[1]

        def put(x: Tensor, layer: int) -> Tensor:
            inner = prompts[layer].expand(len(x), -1, -1)
            return torch.cat([x[:, :1], inner, x[:, 1 + count :]], dim=1)

        x = put(text.token_embedding(tokens), 0) + text.positional_embedding
        for layer, block in enumerate(text.transformer.resblocks):
            x = block(
                put(x, layer) if 0 < layer < len(prompts) else x, attn_mask=text.build_causal_mask()
            )
        ends = text.ln_final(x)[torch.arange(len(x)), tokens.argmax(dim=-1)]
        features: Tensor = ends @ text.text_projection
        return features


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("in_chunks", [False, True])
def test_prompted_text_tower(
    packing: bool, depth: int, in_chunks: bool, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Outputs and prompt gradients, with the graph kept and with chunks computed again."""
    text = make_text().to(dtype).requires_grad_(False)
    tokens = make_tokens(5, generator)
    ours = TextTower(text, dtype)
    if in_chunks:
        ours.graph_bytes = 1  # chunks of a single row
    both_gradients(
        lambda stacked: ours(tokens, list(stacked.unbind(0))),
        lambda stacked: HookedText(text)(tokens, stacked),
        (depth, 4, 48),
        dtype,
        generator,
    )


def test_chunks_keep_less(generator: torch.Generator) -> None:
    """Computing chunks again gives the same gradients to 1e-10 and holds a smaller graph."""
    ours = TextTower(make_text().double(), torch.float64)
    tokens = make_tokens(5, generator)
    kept, gradients = [], []
    for graph_bytes in (1024**3, 1):
        ours.graph_bytes = graph_bytes
        prompts = torch.randn(3, 4, 48, dtype=torch.float64).fill_(0.3).requires_grad_()
        sizes: list[int] = []

        def note(saved: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(saved.numel())
            return saved

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            features = ours(tokens, list(prompts.unbind(0)))
        features.square().sum().backward()
        assert prompts.grad is not None
        kept.append(sum(sizes))
        gradients.append(prompts.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-10)
    assert kept[1] < kept[0] / 5


def test_rows_must_begin_alike(generator: torch.Generator) -> None:
    tokens = make_tokens(1, generator)
    tokens[0, 0] = 3
    with pytest.raises(ModelError, match="all begin with 1 start tokens and 2 prompts"):
        TextTower(make_text())(tokens, [torch.zeros(2, 48)])


def test_freeze_keeps_the_tower_private() -> None:
    tower = make_vision()
    ours: Any = freeze(tower, torch.float32)
    before = ours.conv1.weight.clone()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter += 1
    assert torch.equal(ours.conv1.weight, before)
