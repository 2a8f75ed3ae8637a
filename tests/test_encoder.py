"""The ways of saving memory and time while training give the numbers of the plain way."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from promptkd import DistillConfig, TeachConfig
from promptkd.clip import load_clip
from promptkd.prompts import DeepPrompts
from promptkd.stages.distill import Batch, DistillStep, new_student
from promptkd.stages.encoder import Encoder
from promptkd.stages.run import TrainConfig
from promptkd.stages.teach import PromptSRC, finish_teacher
from tiny import CLASSES, Models
from torch import Tensor, nn

CONFIG = TeachConfig(precision="fp64", templates=("a {}.",), prompt_depth=2)
DISTILL = DistillConfig(precision="fp64", prompt_depth=2)
SAVING: list[dict[str, Any]] = [
    {"micro_batch": 3},
    {"recompute": True},
    {"micro_batch": 2, "recompute": True},
]


def gradients(losses: dict[str, Tensor], parameters: list[nn.Parameter]) -> list[Tensor]:
    """The loss, then the gradient of each parameter."""
    loss = losses["loss"]
    return [loss.detach(), *torch.autograd.grad(loss, parameters)]


def assert_close(mine: list[Tensor], plain: list[Tensor], tolerance: float = 1e-11) -> None:
    for a, b in zip(mine, plain, strict=True):
        atol = tolerance * max(float(b.abs().max()), 1.0)  # a bias before BatchNorm has none
        torch.testing.assert_close(a, b, rtol=tolerance, atol=atol)


def distill_gradients(models: Models, pixels: Tensor, **changes: Any) -> list[Tensor]:
    """Of everything that stage 2 trains, and BatchNorm's running statistics."""
    guide = PromptSRC(load_clip(models.teacher, precision="fp64"), CLASSES, CONFIG)
    teacher = finish_teacher(guide, CLASSES, {})
    config = replace(DISTILL, **changes)
    student = new_student(load_clip(models.student, precision="fp64"), teacher, config).train()
    step = DistillStep(student, teacher.logit_scale, config)
    features = teacher.encode_image(torch.ones(len(pixels), 3, 64, 64, dtype=torch.float64))
    found = gradients(step(Batch(pixels, features)), student.trainable_parameters())
    return [*found, student.projector.norm.running_mean, student.projector.norm.running_var]  # type: ignore[list-item]


@pytest.fixture
def pixels(generator: torch.Generator) -> Tensor:
    return torch.randn(7, 3, 48, 48, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("changes", SAVING)
def test_stage_2_in_less_memory(models: Models, pixels: Tensor, changes: dict[str, Any]) -> None:
    plain = distill_gradients(models, pixels)
    assert_close(distill_gradients(models, pixels, **changes), plain)


@pytest.mark.parametrize("changes", SAVING)
def test_stage_1_in_less_memory(
    models: Models, generator: torch.Generator, changes: dict[str, Any]
) -> None:
    clip = load_clip(models.teacher, precision="fp64")
    pixels = torch.randn(5, 3, 64, 64, dtype=torch.float64, generator=generator)
    labels = torch.tensor([0, 2, 1, 1, 0])
    found = []
    for config in (CONFIG, replace(CONFIG, **changes)):
        model = PromptSRC(clip, CLASSES, config)
        found.append(gradients(model.losses(pixels, labels), model.prompts()))
    assert_close(found[1], found[0])


def saved_bytes(encoder: Encoder, pixels: Tensor, prompts: DeepPrompts) -> int:
    """Bytes that the graph of a forward pass holds, beside the pixels."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        encoder(pixels, prompts())
    kept.pop(pixels.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def test_graphs_are_smaller(models: Models, generator: torch.Generator) -> None:
    tower = load_clip(models.student).vision
    pixels = torch.randn(16, 3, 48, 48, generator=generator)
    prompts = DeepPrompts.random(2, tower.width, 2, generator)
    plain = saved_bytes(Encoder(tower, TrainConfig()), pixels, prompts)
    for changes in SAVING:
        assert saved_bytes(Encoder(tower, TrainConfig(**changes)), pixels, prompts) < plain / 2


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_compiled_towers_agree(models: Models, generator: torch.Generator) -> None:
    """float32 and a batch of another size; gradients too."""
    tower = load_clip(models.student).vision
    compiled = Encoder(tower, TrainConfig(compile=True))
    plain = Encoder(tower, TrainConfig())
    prompts = DeepPrompts.random(2, tower.width, 2, generator)
    for batch in (5, 3):
        pixels = torch.randn(batch, 3, 48, 48, generator=generator)
        found = []
        for encoder in (compiled, plain):
            features = encoder(pixels, prompts())
            grads = torch.autograd.grad(features.square().sum(), list(prompts.parameters()))
            found.append([features.detach(), *grads])
        assert_close(found[0], found[1], 1e-4)


def test_class_subsets_hold_the_batch(models: Models, generator: torch.Generator) -> None:
    """Over all classes the losses of a subset are those without one."""
    model = PromptSRC(load_clip(models.teacher, precision="fp64"), CLASSES, CONFIG)
    pixels = torch.randn(4, 3, 64, 64, dtype=torch.float64, generator=generator)
    labels = torch.tensor([2, 0, 2, 2])
    whole = model.losses(pixels, labels)
    for key, value in model.losses(pixels, labels, torch.arange(3)).items():
        torch.testing.assert_close(value, whole[key])
    part = model.losses(pixels, labels, torch.tensor([0, 2]))
    kept = model.fixed_text[[0, 2]]
    text = model.clip.need_text("test")(model.tokens[[0, 2]], model.text_prompts())
    expected = 25 * (text / text.norm(dim=-1, keepdim=True) - kept).abs().mean()
    torch.testing.assert_close(part["scl_text"], expected)


def test_rate_follows_the_batch_size() -> None:
    plain = TrainConfig(lr=0.01, schedule="cosine", batch_size=8)
    scaled = replace(plain, batch_size=64, lr_batch_size=16)
    assert scaled.learning_rate(3, 10, 20) == pytest.approx(4 * plain.learning_rate(3, 10, 20))
    assert TrainConfig().peak_lr == TrainConfig().lr
    how = replace(plain, micro_batch=2, recompute=True, checkpoint_minutes=1)
    assert how.identity() == plain.identity() != scaled.identity()
    with pytest.raises(ValueError, match="exclude each other"):
        TrainConfig(compile=True, recompute=True)
