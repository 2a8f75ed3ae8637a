"""Every family of open_clip: our towers against the untouched ones, with and without prompts."""

import copy
from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import tiny_families
import torch
from promptkd.clip import load_clip
from promptkd.errors import ModelError
from promptkd.prompts import PromptedNames, context_start
from promptkd.text_tower import TextTower
from promptkd.towers import VisionTower
from tiny_families import FAMILIES, PROMPTED, UNPROMPTED, StubTokenizer
from torch import Tensor, nn

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
NAMES = ("red_thing", "a rather long name of a thing", "blue")


def close(ours: Tensor, theirs: Tensor) -> None:
    """To a share of the largest value."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < TOLERANCE[ours.dtype]


def first(out: Any) -> Tensor:
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found


def images_for(model: Any, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    size = model.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(3, 3, height, width, generator=generator).to(dtype)


def tokenizer(name: str) -> Callable[[list[str]], Tensor]:
    text = FAMILIES[name]["text_cfg"]
    if "hf_tokenizer_name" in text:
        return StubTokenizer("", text["context_length"], **text.get("tokenizer_kwargs", {}))
    made: Callable[[list[str]], Tensor] = open_clip.SimpleTokenizer(
        context_length=text["context_length"]
    )
    return made


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", FAMILIES)
def test_towers_equal_the_librarys(
    name: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    model = tiny_families.make(name).to(dtype)
    images, tokens = images_for(model, generator, dtype), tokenizer(name)(list(NAMES))
    vision, text = VisionTower(model.visual, dtype).train(), TextTower(model, dtype)
    with torch.no_grad():
        close(vision(images), first(model.visual(images)))
        whole = model.text if hasattr(model, "text") else model.encode_text
        theirs = first(whole(tokens))
        close(text(tokens), theirs)
        close(text(text.cut(tokens)), theirs)
        close(text(tokens[1:2]), theirs[1:2])
    assert vision.output_dim == FAMILIES[name]["embed_dim"]
    assert (text.refusal, bool(vision.refusal)) == ("", name in UNPROMPTED)


def reference_vision(model: Any, images: Tensor, prompts: Tensor) -> Tensor:
    """The official way, with the library's own modules: prompts inserted, replaced, taken out.

    In timm's towers they stand behind the class and register tokens, and the attention layers are
    told of more prefix tokens, which they don't turn.
    """
    visual, count = copy.deepcopy(model.visual), prompts.shape[1]
    in_timm = hasattr(visual, "trunk")
    trunk = visual.trunk if in_timm else visual
    rope = None
    if in_timm:
        x = trunk._pos_embed(trunk.patch_embed(images))
        x, rope = x if isinstance(x, tuple) else (x, None)
        norm, place = trunk.norm_pre, trunk.num_prefix_tokens
        for module in trunk.blocks.modules():
            if hasattr(module, "num_prefix_tokens"):
                module.num_prefix_tokens += count
    else:
        x = trunk.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([trunk.class_embedding.expand(len(x), 1, -1), x], 1)
        x, norm = x + trunk.positional_embedding, trunk.ln_pre
        place = x.shape[1]

    def put(x: Tensor, layer: int, skip: int) -> Tensor:
        inner = prompts[layer].expand(len(x), -1, -1)
        return torch.cat([x[:, :place], inner, x[:, place + skip :]], dim=1)

    x = norm(put(x, 0, 0))
    for layer, block in enumerate(trunk.blocks if in_timm else trunk.transformer.resblocks):
        x = put(x, layer, count) if 0 < layer < len(prompts) else x
        x = block(x) if rope is None else block(x, rope=rope)
    x = torch.cat([x[:, :place], x[:, place + count :]], dim=1)
    if in_timm:
        return first(visual.head(trunk.forward_head(trunk.norm(x))))
    return first(trunk._pool(x)[0] @ trunk.proj)


def with_gradient(run: Callable[[Tensor], Tensor], prompts: Tensor) -> tuple[Tensor, Tensor]:
    leaf = prompts.clone().requires_grad_()
    out = run(leaf)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return out.detach(), torch.autograd.grad((out * weights).sum(), leaf)[0]


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("name", PROMPTED)
def test_prompted_vision(name: str, depth: int, generator: torch.Generator) -> None:
    model = tiny_families.make(name).double().requires_grad_(False)
    images = images_for(model, generator, torch.float64)
    ours = VisionTower(model.visual, torch.float64)
    prompts = torch.randn(depth, 4, ours.width, generator=generator, dtype=torch.float64)
    mine = with_gradient(lambda p: ours(images, list(p.unbind())), prompts)
    theirs = with_gradient(lambda p: reference_vision(model, images, p), prompts)
    for a, b in zip(mine, theirs, strict=True):
        close(a, b)
    assert float((mine[0] - ours(images)).abs().max()) > 1e-3  # prompts matter


def reference_text(model: Any, tokens: Tensor, prompts: Tensor, start: int) -> Tensor:
    """The official way: whole sentences, context tokens replaced block by block by hooks."""
    text, count = model, prompts.shape[1]
    whole = model.text if hasattr(model, "text") else model.encode_text
    blocks = (model.text if hasattr(model, "text") else text).transformer.resblocks

    def put(x: Tensor, layer: int) -> Tensor:
        inner = prompts[layer].expand(len(x), -1, -1)
        return torch.cat([x[:, :start], inner, x[:, start + count :]], dim=1)

    def hook(layer: int) -> Any:
        return lambda module, inputs: (put(inputs[0], layer), *inputs[1:])

    embedding = (model.text if hasattr(model, "text") else model).token_embedding
    handles = [embedding.register_forward_hook(lambda m, i, out: put(out, 0))]
    for layer in range(1, len(prompts)):
        handles.append(blocks[layer].register_forward_pre_hook(hook(layer)))
    try:
        return first(whole(tokens))
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("graph_bytes", [2**30, 1])
@pytest.mark.parametrize("name", PROMPTED)
def test_prompted_text(name: str, graph_bytes: int, generator: torch.Generator) -> None:
    """Context tokens lie behind the start token, or first where there is none."""
    model = tiny_families.make(name).double().requires_grad_(False)
    tokenize: Any = tokenizer(name)
    start = context_start(tokenize)
    assert start == (0 if name.startswith("siglip") else 1)
    names = PromptedNames(NAMES, "a photo of a {}.", 5, tokenize)
    ours = TextTower(model, torch.float64, start)
    ours.graph_bytes = graph_bytes
    assert torch.equal(names.context[:4], tokenize(["a photo of a"])[0, start : start + 4])
    prompts = torch.randn(2, 5, ours.width, generator=generator, dtype=torch.float64)
    tokens = ours.cut(names.tokens)
    assert (tokens.shape[1] < names.tokens.shape[1]) is ours.may_cut
    mine = with_gradient(lambda p: ours(tokens, list(p.unbind())), prompts)
    theirs = with_gradient(lambda p: reference_text(model, names.tokens, p, start), prompts)
    for a, b in zip(mine, theirs, strict=True):
        close(a, b)


def test_only_causal_towers_are_cut() -> None:
    cut = {n for n in PROMPTED if TextTower(tiny_families.make(n)).may_cut}
    assert set(PROMPTED) - cut == {"clipa", "coca", "siglip", "siglip-rest", "mobileclip2-l"}


@pytest.mark.parametrize(("name", "room"), [("siglip", 15), ("clipa", 14), ("vit", 74)])
def test_names_that_leave_no_room(name: str, room: int) -> None:
    """Prompts, a one-word name, and start and end tokens where there are any, must fit."""
    tokenize: Any = tokenizer(name)
    assert PromptedNames(["cat"], "a {}", room, tokenize).tokens.shape == (
        1,
        FAMILIES[name]["text_cfg"]["context_length"],
    )
    with pytest.raises(ModelError, match="leave no room for the longest class name"):
        PromptedNames(["cat"], "a {}", room + 1, tokenize)


@pytest.mark.parametrize("name", UNPROMPTED)
def test_what_takes_no_prompts_is_refused_by_name(name: str) -> None:
    clip = load_clip(tiny_families.make(name))
    inner = {"resnet": "ModifiedResNet", "convnext": "ConvNeXt"}[name]
    with pytest.raises(ModelError, match=f"{inner} is not made of plain blocks.*SigLIP2, PE-Core"):
        clip.need_prompts("a student")
    with pytest.raises(ModelError, match="takes no deep prompts"):
        clip.vision(torch.zeros(1, 3, *clip.preprocess.size), [torch.zeros(2, 8)])


@pytest.mark.parametrize("name", ["siglip", "vitamin", "mobileclip-b", "eva02"])
def test_half_precision(name: str, generator: torch.Generator) -> None:
    """bfloat16 weights, rotations in float32."""
    clip = load_clip(tiny_families.make(name), text=False)
    half = load_clip(tiny_families.make(name), text=False, precision="bf16")
    assert half.vision.rope is None or half.vision.rope.dtype == torch.float32
    images = torch.randn(3, 3, *clip.preprocess.size, generator=generator)
    prompts = [torch.randn(4, 32, generator=generator) for _ in range(2)]
    with torch.no_grad():
        exact, rough = clip.vision(images, prompts), half.vision(images, prompts).float()
    assert torch.nn.functional.cosine_similarity(exact, rough).min() > 0.99


def test_siglips_scale_is_read_and_its_bias_cancels(generator: torch.Generator) -> None:
    model = tiny_families.make("siglip")
    with torch.no_grad():
        model.logit_scale.fill_(2.5)
    clip = load_clip(model, text=False)
    assert clip.logit_scale == pytest.approx(2.718281828**2.5)
    images = images_for(model, generator, torch.float32)
    tokens = StubTokenizer("", 16, clean="canonicalize")(list(NAMES))
    image, text = (
        torch.nn.functional.normalize(t) for t in (model.visual(images), model.text(tokens))
    )
    theirs = model.get_logits(images, tokens)[0]
    assert float(model.logit_bias.detach()) != 0
    ours = clip.logit_scale * image @ text.T
    assert not torch.allclose(ours, theirs, atol=1e-2)
    torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1))


class Bert(nn.Module):
    """What open_clip asks of a Hugging Face model, which needs a download: hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(400, 16), nn.Linear(16, 16)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        hidden = self.linear(self.embedding(input_ids)) * attention_mask[..., None]
        return type("Output", (), {"last_hidden_state": hidden})()


def with_hf_text() -> Any:
    """A model whose text side is open_clip's adapter around `Bert`."""
    from open_clip.hf_model import HFTextEncoder, MeanPooler

    model: Any = tiny_families.make("eva01")
    text: Any = HFTextEncoder.__new__(HFTextEncoder)
    nn.Module.__init__(text)
    text.config = type("Config", (), {"pad_token_id": 1})()
    text.transformer, text.pooler, text.proj = Bert(), MeanPooler(), nn.Linear(16, 20, bias=False)
    text.output_tokens, text.context_length, text.vocab_size = False, 16, 49408
    model.text = text.eval()
    return model


def test_text_of_hugging_face_is_frozen() -> None:
    model = with_hf_text()
    tower, tokens = TextTower(model), StubTokenizer("", 16)(list(NAMES))
    with torch.no_grad():
        close(tower(tower.cut(tokens)), model.text(tokens))
    with pytest.raises(ModelError, match=r"HFTextEncoder is not open_clip's own.*takes no prompts"):
        tower(tokens, [torch.zeros(2, 16)])
    clip = load_clip(model)
    clip.need_prompts("a student")
    with pytest.raises(ModelError, match=r"can't tune a teacher.* zero-shot teacher"):
        clip.need_prompted_text("tune a teacher")
