"""Write the official-checkpoint fixtures with Dassl itself: `make_fixtures.py DASSL OUT PREFIX`.

DASSL is a checkout of KaiyangZhou/Dassl.pytorch (or the copy inside PromptKD); its own
`save_checkpoint` writes the file, with the dictionary that its `TrainerBase.save_model` makes,
a live `ConstantWarmupScheduler` around `CosineAnnealingLR`, and an SGD that has stepped.
Names, shapes and dtypes are those of PromptSRC teachers and PromptKD students, sizes tiny.
The committed files were written once, with the torch that their prefix names.
"""

import sys
import types
import warnings
from pathlib import Path

import torch
from torch import nn

PROMPTS, WIDTH, TEXT_WIDTH, STUDENT_DIM, TEACHER_DIM, CLASSES = 4, 8, 6, 5, 7, 3


def add(module: nn.Module, name: str, value: torch.Tensor, trained: bool) -> None:
    """Put a parameter under a dotted name."""
    *path, last = name.split(".")
    for part in path:
        if not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = getattr(module, part)
    module.register_parameter(last, nn.Parameter(value, requires_grad=trained))


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).half()


def add_tower(model: nn.Module, top: str, width: int, layers: int) -> None:
    for i in range(layers):
        add(model, f"{top}.transformer.resblocks.{i}.ln_1.weight", normal(width), False)


def add_prompts(model: nn.Module, top: str, first: str, width: int, depth: int) -> None:
    add(model, first, normal(PROMPTS, width), True)
    for i in range(1, depth):
        name = f"{top}.transformer.resblocks.{i}.VPT_shallow"
        add(model, name, normal(PROMPTS, width), True)


def teacher(depth: int) -> nn.Module:
    model = nn.Module()
    add(model, "logit_scale", torch.tensor(4.6052).half(), False)
    add_tower(model, "image_encoder", WIDTH, 12)
    add_tower(model, "text_encoder", TEXT_WIDTH, 12)
    add_prompts(model, "image_encoder", "image_encoder.VPT", WIDTH, depth)
    add_prompts(model, "text_encoder", "prompt_learner.ctx", TEXT_WIDTH, depth)
    # PromptSRC keeps a frozen image encoder and the embedded class names there.
    add_tower(model, "prompt_learner.ZS_image_encoder", WIDTH, 2)
    learner = model.prompt_learner
    learner.register_buffer("token_prefix", normal(CLASSES, 1, TEXT_WIDTH))
    learner.register_buffer("token_suffix", normal(CLASSES, 72, TEXT_WIDTH))
    return model


def student(depth: int) -> nn.Module:
    model = nn.Module()
    add(model, "logit_scale", torch.tensor(4.6052).half(), False)
    add_tower(model, "image_encoder", WIDTH, 12)
    add_prompts(model, "image_encoder", "image_encoder.VPT", WIDTH, depth)
    projector = nn.Module()
    projector.conv1 = nn.Sequential(
        nn.Conv2d(STUDENT_DIM, TEACHER_DIM, 1),
        nn.BatchNorm2d(TEACHER_DIM),
        nn.ReLU(inplace=True),
        nn.Conv2d(TEACHER_DIM, TEACHER_DIM, 1),
    )
    for _ in range(3):  # running statistics other than the initial ones
        projector.conv1(torch.randn(4, STUDENT_DIM, 1, 1))
    for layer in (projector.conv1[0], projector.conv1[3]):
        layer.half()  # what the official convert_weights does: convolutions, not BatchNorm
    model.add_module("VPT_image_trans", projector)
    return model


def optimiser(model: nn.Module, scheduler_class: type, epochs: int) -> tuple[object, object]:
    optim = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad],
        lr=0.005,
        momentum=0.9,
        weight_decay=5e-4,
        dampening=0,
        nesterov=False,
    )
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optim, float(epochs))
    scheduler = scheduler_class(optim, cosine, 1, 1e-5)
    for _ in range(2):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn_like(parameter)
        optim.step()
        scheduler.step()
    return optim, scheduler


def drop_verbose() -> None:
    """Newer torch removed the argument `verbose` that Dassl's schedulers hand on."""
    base = torch.optim.lr_scheduler._LRScheduler
    if "verbose" in base.__init__.__code__.co_varnames:
        return
    inner = base.__init__

    def init(self, optimizer, last_epoch=-1, verbose=False):
        inner(self, optimizer, last_epoch)

    base.__init__ = init


def main() -> None:
    dassl, out, prefix = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    for name in ("utils", "optim"):  # only these two files are needed, not Dassl's imports
        package = types.ModuleType(f"dassl.{name}")
        package.__path__ = [str(dassl / "dassl" / name)]
        sys.modules[package.__name__] = package
    top = types.ModuleType("dassl")
    top.__path__ = [str(dassl / "dassl")]
    sys.modules["dassl"] = top
    drop_verbose()
    from dassl.optim.lr_scheduler import ConstantWarmupScheduler
    from dassl.utils.torchtools import save_checkpoint

    warnings.simplefilter("ignore")
    torch.manual_seed(20240305)
    for name, model, epoch, best in (
        ("teacher-d9", teacher(9), 19, True),
        ("teacher-d3", teacher(3), 20, False),
        ("student-d9", student(9), 14, True),
        ("student-d3", student(3), 20, False),
    ):
        optim, scheduler = optimiser(model, ConstantWarmupScheduler, 20)
        state = {
            "state_dict": model.state_dict(),
            "epoch": epoch,
            "optimizer": optim.state_dict(),
            "scheduler": scheduler.state_dict(),
            "val_result": 81.25 if best else None,
        }
        save_checkpoint(state, str(out / f"{prefix}-{name}"), is_best=best)


if __name__ == "__main__":
    main()
