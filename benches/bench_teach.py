"""A step of stage 1 against the official code's: ViT-L/14, batch 4, random weights.

    python benches/bench_teach.py --official PATH [--classes 100] [--rounds 3]

PATH is a folder or git directory of the public PromptKD code, whose PromptSRC trainer runs;
without it, the same work runs through open_clip's own towers. Both sides start from prompts of
their own: a step's time does not depend on them.
"""

import argparse
import gc
import io
import types
import warnings
from collections.abc import Callable
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from bench_step import PRECISIONS, make_model, our_clip
from common import CLOCKS, Row, interleave, report, typical
from official_step import (
    DEPTH,
    DESIGN,
    NUM_PROMPTS,
    import_official,
    library_text,
    library_vision,
    name_classes,
    no_devices,
    official_clip,
)
from promptkd.stages.teach import PromptSRC, TeachConfig
from torch import Tensor, nn
from torch.nn import functional as F

TARGETS = {"fp32": 2.6, "bf16": 5.0}
FROZEN = {**DESIGN, "vision_depth": 0, "language_depth": 0, "vision_ctx": 0, "language_ctx": 0}
TEMPLATES = ("a photo of a {}.",)  # of features that are computed once, not in a step


class OfficialTeach:
    """The public PromptSRC trainer's own step; its halves are whole."""

    def __init__(self, source: Path, teacher: nn.Module, names: list[str]) -> None:
        code = import_official(source, "promptsrc")
        code.IMAGENET_TEMPLATES = list(TEMPLATES)
        code.load_clip_to_cpu = lambda _cfg, frozen=False: official_clip(
            teacher, FROZEN if frozen else DESIGN
        )
        cfg = _config()
        with _no_halves(), redirect_stdout(io.StringIO()):
            trainer = code.PromptSRC.__new__(code.PromptSRC)
            model = code.CustomCLIP(cfg, names, official_clip(teacher)).float().train()
        model.text_encoder.dtype = model.dtype = torch.float32
        for name, parameter in model.named_parameters():
            trains = "ZS_image_encoder" not in name and ("VPT" in name or "prompt_learner" in name)
            parameter.requires_grad_(trains)
        trainer.cfg, trainer.device, trainer.scaler, trainer.model = cfg, "cpu", None, model
        trained = [p for p in model.parameters() if p.requires_grad]
        trainer.optim = torch.optim.SGD(trained, lr=0.0025, momentum=0.9, weight_decay=5e-4)
        trainer.batch_idx, trainer.num_batches, trainer.step_counter = 0, 1_000_000, 1
        self.trainer = trainer

    def __call__(self, pixels: Tensor, labels: Tensor) -> float:
        with _no_halves():
            loss: float = self.trainer.forward_backward({"img": pixels, "label": labels})["loss"]
        return loss


class LibraryTeach:
    """The same work through open_clip's own towers."""

    def __init__(self, teacher: Any, names: list[str]) -> None:
        self.teacher = teacher
        self.tokens = open_clip.SimpleTokenizer()([f"a photo of a {n}." for n in names])
        widths = {
            "vision": teacher.visual.conv1.out_channels,
            "text": teacher.ln_final.weight.numel(),
        }
        self.prompts = {
            side: [nn.Parameter(0.02 * torch.randn(NUM_PROMPTS, width)) for _ in range(DEPTH)]
            for side, width in widths.items()
        }
        with torch.no_grad():
            self.fixed = F.normalize(library_text(teacher, self.tokens, ()), dim=-1)
        trained = [p for prompts in self.prompts.values() for p in prompts]
        self.optimizer = torch.optim.SGD(trained, lr=0.0025, momentum=0.9, weight_decay=5e-4)

    def __call__(self, pixels: Tensor, labels: Tensor) -> float:
        scale = self.teacher.logit_scale.exp()
        text = F.normalize(library_text(self.teacher, self.tokens, self.prompts["text"]), dim=-1)
        raw = library_vision(self.teacher.visual, pixels, self.prompts["vision"])
        image = F.normalize(raw, dim=-1)
        with torch.no_grad():
            frozen = F.normalize(self.teacher.visual(pixels), dim=-1)
            zero_shot = (scale * frozen @ self.fixed.T).log_softmax(dim=1)
        logits = scale * image @ text.T
        loss = F.cross_entropy(logits, labels) + 25 * (text - self.fixed).abs().mean()
        loss = loss + 10 * (image - frozen).abs().mean()
        kl = F.kl_div(logits.log_softmax(dim=1), zero_shot, reduction="sum", log_target=True)
        loss = loss + kl / logits.numel()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


class OurTeach:
    """Our step of stage 1."""

    def __init__(self, names: list[str], precision: str) -> None:
        config = TeachConfig(precision=precision, templates=TEMPLATES, lr=0.0025)
        self.model = PromptSRC(our_clip("ViT-L-14", precision), names, config)
        self.optimizer = config.make_optimizer(self.model.prompts())

    def __call__(self, pixels: Tensor, labels: Tensor) -> float:
        loss = self.model.losses(pixels, labels)["loss"]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


def _config() -> Any:
    part = types.SimpleNamespace
    settings = part(
        N_CTX_VISION=NUM_PROMPTS,
        N_CTX_TEXT=NUM_PROMPTS,
        CTX_INIT="a photo of a",
        PREC="fp32",
        PROMPT_DEPTH_VISION=DEPTH,
        PROMPT_DEPTH_TEXT=DEPTH,
        TEXT_LOSS_WEIGHT=25,
        IMAGE_LOSS_WEIGHT=10,
    )
    return part(
        TRAINER=part(PROMPTSRC=settings, NAME="PromptSRC"),
        INPUT=part(SIZE=(224, 224)),
        OPTIM=part(MAX_EPOCH=20),
    )


@contextmanager
def _no_halves() -> Any:
    """No devices, and no casts to half precision, which would not multiply with float32."""
    kept = Tensor.half
    Tensor.half = lambda self, *_, **__: self  # type: ignore[method-assign, assignment]
    try:
        with no_devices():
            yield
    finally:
        Tensor.half = kept  # type: ignore[method-assign]


def measure(args: argparse.Namespace) -> list[Row]:
    names = name_classes(args.classes)
    teacher = make_model("ViT-L-14")
    baseline: Callable[[Tensor, Tensor], float] = (
        OfficialTeach(args.official, teacher, names)
        if args.official
        else LibraryTeach(teacher, names)
    )
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(args.batch, 3, 224, 224, generator=generator)
    labels = torch.randint(args.classes, (args.batch,), generator=generator)
    sides = {p: OurTeach(names, p) for p in args.precisions}
    gc.collect()
    functions: dict[str, Callable[[], Any]] = {"official": lambda: baseline(pixels, labels)}
    for p, side in sides.items():
        functions[p] = lambda side=side: side(pixels, labels)
    taken = interleave(functions, args.rounds, clock=CLOCKS[args.clock])
    seconds = {name: typical(values) for name, values in taken.items()}
    meant = (args.classes, args.batch) == (100, 4)
    return [
        Row(
            f"stage 1, {args.classes} classes, batch {args.batch}, {p}",
            seconds[p],
            seconds["official"],
            "s",
            TARGETS[p] if meant else None,
        )
        for p in sides
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--official", type=Path, help="folder or git directory of the public code")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.threads:
        torch.set_num_threads(args.threads)
    kind = "official code" if args.official else "open_clip's towers"
    print(report("teach", measure(args), output=args.output, baseline=kind, clock=args.clock))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_step(benchmark: Any, precision: str) -> None:
    """Our step of stage 1 over 100 classes."""
    side = OurTeach(name_classes(100), precision)
    pixels = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(2))
    arguments = (pixels, torch.tensor([1, 5, 9, 50]))
    benchmark.group = "stage 1"
    benchmark.pedantic(side, args=arguments, rounds=2, warmup_rounds=1)


if __name__ == "__main__":
    main()
