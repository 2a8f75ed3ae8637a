"""The step that ours is measured against, on the CPU, over the same random weights.

`OfficialStep` runs the public code's own `forward_backward` from a folder or git directory, with
its device calls made no-ops and its engine replaced by stubs. `LibraryStep` does the same work
with open_clip's own towers where that code can't be had. Both encode all classes in every step.
"""

import functools
import importlib
import io
import math
import subprocess
import sys
import tarfile
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from torch.nn import functional as F

NUM_PROMPTS, DEPTH = 4, 9
DESIGN = {
    "trainer": "IVLP",
    "vision_depth": DEPTH,
    "language_depth": DEPTH,
    "vision_ctx": NUM_PROMPTS,
    "language_ctx": NUM_PROMPTS,
}


class TimedStep:
    """A step whose parts are timed: `seconds` has "teacher image", "teacher text", "whole"."""

    clock: Callable[[], float] = staticmethod(time.perf_counter)

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        start = self.clock()
        yield
        self.seconds.setdefault(part, []).append(self.clock() - start)

    def watch(self, module: nn.Module, part: str) -> None:
        """Time every forward pass of a module."""
        inner: Callable[..., Any] = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            with self.timed(part):
                return inner(*args, **kwargs)

        module.forward = forward  # type: ignore[method-assign]


class OfficialStep(TimedStep):
    """The public PromptKD trainer's own step.

    Its text encoder is called on `text_rows` classes at a time: the same products in less memory,
    so that 1000 classes fit into 24 GB; its time is, if anything, shorter.
    """

    def __init__(
        self,
        source: Path,
        teacher: nn.Module,
        student: nn.Module,
        names: Sequence[str],
        text_rows: int = 250,
    ) -> None:
        super().__init__()
        code = import_official(source, "promptkd")
        cfg = _config()
        with no_devices(), redirect_stdout(io.StringIO()):
            trainer = code.PromptKD.__new__(code.PromptKD)
            trainer.cfg, trainer.device, trainer.scaler = cfg, "cpu", None
            model = code.CustomCLIP(cfg, names, official_clip(student)).float()
            guide = code.CustomCLIP_teacher(cfg, names, official_clip(teacher)).float().eval()
        guide.text_encoder.dtype = guide.dtype = model.dtype = torch.float32
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("VPT" in name)
        trainer.model, trainer.model_teacher = model, guide
        trainer.optim = torch.optim.SGD(
            model.parameters(), lr=0.005, momentum=0.9, weight_decay=5e-4
        )
        trainer.temperature, trainer.batch_idx, trainer.num_batches = 1.0, 0, 1_000_000
        self.trainer = trainer
        _slice_rows(guide.text_encoder, text_rows)
        self.watch(guide.image_encoder, "teacher image")
        self.watch(guide.text_encoder, "teacher text")

    def __call__(self, pixels: Tensor) -> float:
        batch = {"img": pixels, "label": torch.zeros(len(pixels), dtype=torch.long)}
        with no_devices(), self.timed("whole"):
            loss: float = self.trainer.forward_backward(batch)["loss"]
        return loss

    def prompts(self) -> dict[str, list[Tensor]]:
        """All prompts by tower, to start ours from the same values."""
        guide, model = self.trainer.model_teacher, self.trainer.model
        return {
            "teacher vision": _deep(guide.image_encoder.VPT, guide.image_encoder),
            "teacher text": _deep(guide.prompt_learner.ctx, guide.text_encoder),
            "student": _deep(model.image_encoder.VPT, model.image_encoder),
        }

    def projector(self) -> nn.Sequential:
        """Linear, BatchNorm, ReLU, linear, as 1x1 convolutions."""
        found: nn.Sequential = self.trainer.model.VPT_image_trans.conv1
        return found


class LibraryStep(TimedStep):
    """The same work as the official code does, through open_clip's own towers."""

    def __init__(self, teacher: Any, student: Any, names: Sequence[str]) -> None:
        super().__init__()
        self.teacher = teacher.eval().requires_grad_(False)
        self.student = student.eval().requires_grad_(False)
        tokenize = open_clip.SimpleTokenizer()
        self.tokens = tokenize([f"a photo of a {name}." for name in names])
        self.text_rows = 250

        def prompts(width: int, tower: Any) -> list[Tensor]:
            depth = min(DEPTH, len(tower.transformer.resblocks))
            return [0.02 * torch.randn(NUM_PROMPTS, width) for _ in range(depth)]

        self._prompts = {
            "teacher vision": prompts(teacher.visual.conv1.out_channels, teacher.visual),
            "teacher text": prompts(teacher.token_embedding.embedding_dim, teacher),
            "student": [
                nn.Parameter(p) for p in prompts(student.visual.conv1.out_channels, student.visual)
            ],
        }
        wide = teacher.visual.output_dim
        self._projector = nn.Sequential(
            nn.Conv2d(student.visual.output_dim, wide, 1),
            nn.BatchNorm2d(wide),
            nn.ReLU(inplace=True),
            nn.Conv2d(wide, wide, 1),
        )
        trained = [*self._prompts["student"], *self._projector.parameters()]
        self.optimizer = torch.optim.SGD(trained, lr=0.005, momentum=0.9, weight_decay=5e-4)

    def prompts(self) -> dict[str, list[Tensor]]:
        return self._prompts

    def projector(self) -> nn.Sequential:
        return self._projector

    def __call__(self, pixels: Tensor) -> float:
        with self.timed("whole"):
            with torch.no_grad():
                with self.timed("teacher text"):
                    rows = self.tokens.split(self.text_rows)
                    prompts = self._prompts["teacher text"]
                    text = torch.cat([library_text(self.teacher, r, prompts) for r in rows])
                    text = F.normalize(text, dim=-1)
                with self.timed("teacher image"):
                    image = library_vision(
                        self.teacher.visual, pixels, self._prompts["teacher vision"]
                    )
                wanted = self.teacher.logit_scale.exp() * F.normalize(image, dim=-1) @ text.T
            raw = library_vision(self.student.visual, pixels, self._prompts["student"])
            mine = F.normalize(self._projector(raw[:, :, None, None])[:, :, 0, 0], dim=-1)
            logits = self.student.logit_scale.exp() * mine @ text.T
            kl = F.kl_div(logits.log_softmax(1), wanted.softmax(1), reduction="sum")
            loss = 1000 * kl / logits.numel()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return float(loss.detach())


def library_text(model: Any, tokens: Tensor, prompts: Sequence[Tensor]) -> Tensor:
    """Raw features of token rows by open_clip's own text tower, all 77 places."""
    x = model.token_embedding(tokens)
    for layer, block in enumerate(model.transformer.resblocks):
        if layer < len(prompts):
            inner = prompts[layer].expand(len(x), -1, -1)
            x = torch.cat([x[:, :1], inner, x[:, 1 + NUM_PROMPTS :]], dim=1)
        x = block(x + model.positional_embedding if layer == 0 else x, attn_mask=model.attn_mask)
    ends = model.ln_final(x)[torch.arange(len(x)), tokens.argmax(dim=-1)]
    features: Tensor = ends @ model.text_projection
    return features


def library_vision(tower: Any, pixels: Tensor, prompts: Sequence[Tensor]) -> Tensor:
    x = tower.conv1(pixels).flatten(2).transpose(1, 2)
    x = torch.cat([tower.class_embedding.expand(len(x), 1, -1), x], dim=1)
    x = x + tower.positional_embedding
    x = tower.ln_pre(torch.cat([x, prompts[0].expand(len(x), -1, -1)], dim=1))
    for layer, block in enumerate(tower.transformer.resblocks):
        if 0 < layer < len(prompts):
            x = torch.cat([x[:, :-NUM_PROMPTS], prompts[layer].expand(len(x), -1, -1)], dim=1)
        x = block(x)
    features: Tensor = tower.ln_post(x[:, 0]) @ tower.proj
    return features


def _slice_rows(encoder: nn.Module, rows: int) -> None:
    """Call a text encoder, which treats every class by itself, on some classes at a time."""
    whole: Callable[..., Tensor] = encoder.forward

    def forward(prompts: Tensor, tokens: Tensor) -> Tensor:
        pairs = zip(prompts.split(rows), tokens.split(rows), strict=True)
        return torch.cat([whole(p, t) for p, t in pairs])

    encoder.forward = forward  # type: ignore[method-assign]


def _deep(first: Tensor, tower: Any) -> list[Tensor]:
    blocks = tower.transformer.resblocks
    later = [block.VPT_shallow for block in blocks[1:] if block.add_prompt]
    return [t.detach().clone() for t in (first, *later)]


def official_clip(model: Any, design: dict[str, Any] | None = None) -> nn.Module:
    """The public code's CLIP on the weights of an open_clip model, which it shares."""
    from clip.model import CLIP  # type: ignore[import-not-found]

    visual, text = model.visual, model
    width = text.token_embedding.embedding_dim
    built: nn.Module = CLIP(
        visual.output_dim,
        visual.image_size[0],
        len(visual.transformer.resblocks),
        visual.conv1.out_channels,
        visual.patch_size[0],
        text.context_length,
        text.vocab_size,
        width,
        width // 64,
        len(text.transformer.resblocks),
        design or DESIGN,
    )
    result = built.load_state_dict(model.state_dict(), strict=False, assign=True)
    assert not result.unexpected_keys
    assert all("VPT" in key for key in result.missing_keys)
    return built.float().eval()


def _config() -> Any:
    part = types.SimpleNamespace
    promptkd = part(
        N_CTX_VISION=NUM_PROMPTS,
        N_CTX_TEXT=NUM_PROMPTS,
        CTX_INIT="a photo of a",
        PREC="fp32",
        PROMPT_DEPTH_VISION=DEPTH,
        PROMPT_DEPTH_TEXT=DEPTH,
        TEMPERATURE=1.0,
        KD_WEIGHT=1000.0,
    )
    return part(
        TRAINER=part(PROMPTKD=promptkd, NAME="PromptKD", MODAL="cross"),
        INPUT=part(SIZE=(224, 224)),
        OPTIM=part(MAX_EPOCH=20),
    )


@functools.cache
def import_official(source: Path, name: str) -> Any:
    """Import trainers.`name` of the public code, its engine replaced by stubs."""
    _find_official(source)
    return importlib.import_module(f"trainers.{name}")


@functools.cache
def _find_official(source: Path) -> None:
    folder = Path(tempfile.mkdtemp(prefix="official-"))
    if (source / "trainers").is_dir():
        folder = source
    else:
        command = ["git", f"--git-dir={source}", "archive", "HEAD", "clip", "trainers"]
        archive = subprocess.run(command, check=True, capture_output=True).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(folder, filter="data")
    sys.path.insert(0, str(folder))
    registry = types.SimpleNamespace(register=lambda: lambda cls: cls)
    _stub("dassl")
    _stub("dassl.engine", TRAINER_REGISTRY=registry, TrainerX=object)
    _stub("dassl.utils", load_pretrained_weights=None, load_checkpoint=None)
    _stub("dassl.optim", build_optimizer=None, build_lr_scheduler=None)


def _stub(name: str, **content: Any) -> None:
    module = types.ModuleType(name)
    module.__dict__.update(content)
    sys.modules[name] = module


@contextmanager
def no_devices() -> Iterator[None]:
    """`.cuda()` does nothing; half-precision casts of prompts keep their precision's range."""
    kept = nn.Module.cuda, Tensor.cuda
    nn.Module.cuda = Tensor.cuda = lambda self, *_, **__: self  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.Module.cuda, Tensor.cuda = kept  # type: ignore[method-assign]


def name_classes(number: int) -> list[str]:
    """Class names of two or three words, all different."""
    first = (
        "red",
        "old",
        "tiny",
        "striped",
        "wild",
        "young",
        "silver",
        "spotted",
        "northern",
        "tall",
    )
    second = ("cat", "truck", "golden retriever", "lamp", "orchid", "bridge", "teapot", "warbler")
    third = ("", " at night", " on a table", " with snow", " in the rain", " from above")
    fourth = ("", ", close", ", far away")
    size = len(first) * len(second) * len(third) * len(fourth)
    assert number <= size, f"at most {size} names, not {math.ceil(number)}"
    every = (f"{a} {b}{c}{d}" for d in fourth for c in third for b in second for a in first)
    return [name for name, _ in zip(every, range(number), strict=False)]
