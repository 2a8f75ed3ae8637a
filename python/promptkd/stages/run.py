"""A run on disk: its identity, checkpoints, log and progress; and the training loop over it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from promptkd.clip import PRECISIONS
from promptkd.errors import CheckpointError, TrainingError
from promptkd.files import read_tensors, sweep, write_json, write_tensors
from promptkd.ranks import ALONE, Ranks
from promptkd.stages.progress import Progress

B = TypeVar("B")
B_co = TypeVar("B_co", covariant=True)

PAPER_FIRST_LR = 1e-5
_CHECKPOINT = "checkpoint.safetensors"
_EPOCH_CHECKPOINT_SECONDS = 10.0
_HOW = ("checkpoint_minutes", "micro_batch", "recompute", "compile")
"""Settings that change how a result is reached, but not the result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """What both stages have in common."""

    epochs: int = 20
    """Passes over the pictures."""
    min_steps: int = 0
    """Go on for at least so many steps, whatever `epochs` says (a small folder needs them)."""
    max_steps: int | None = None
    """Stop after so many steps, whatever `epochs` says."""
    batch_size: int = 8
    """Pictures a step."""
    lr: float = 0.005
    """Peak learning rate."""
    lr_batch_size: int = 0
    """The batch size that `lr` is meant for: with another one the rate is scaled in proportion.
    0: take `lr` as it stands."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """"sgd": momentum 0.9, no Nesterov; "adamw": the default betas."""
    schedule: Literal["paper", "cosine"] = "paper"
    """"paper": by epochs, the first at 1e-5, then a cosine; "cosine": by steps, after a warm-up."""
    weight_decay: float = 5e-4
    """On everything that trains."""
    warmup_steps: int = 0
    """Steps of linear warm-up ("cosine" only)."""
    num_prompts: int = 4
    """Prompt tokens a layer."""
    prompt_depth: int = 9
    """Prompted layers, from the first; at most all there are."""
    templates: tuple[str, ...] = ("a photo of a {}.",)
    """Templates of zero-shot text features."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Share of the picture that a training view covers."""
    precision: str = "fp32"
    """How frozen weights are stored: fp32, bf16, fp16 (fp64 for tests)."""
    seed: int = 1
    """Everything random follows from it."""
    checkpoint_minutes: float = 10.0
    """A checkpoint at least so often; also at the end of an epoch."""
    micro_batch: int = 0
    """Save memory: pictures that go through the tower at once, forward and again backward; the
    loss (and BatchNorm) still sees the whole batch. 0: all of them."""
    recompute: bool = False
    """Save memory: compute each layer's activations again in the backward pass."""
    compile: bool = False
    """Compile the tower with torch.compile (needs a C++ compiler on a CPU)."""

    def __post_init__(self) -> None:
        checks: list[tuple[bool, str]] = [
            (self.epochs >= 1, "epochs must be at least 1"),
            (self.min_steps >= 0, "min_steps must not be negative"),
            (self.max_steps is None or self.max_steps >= 1, "max_steps must be at least 1"),
            (self.batch_size >= 2, "batch_size must be at least 2 (BatchNorm needs two pictures)"),
            (self.lr > 0, "lr must be positive"),
            (self.lr_batch_size >= 0, "lr_batch_size must not be negative"),
            (self.weight_decay >= 0, "weight_decay must not be negative"),
            (self.warmup_steps >= 0, "warmup_steps must not be negative"),
            (self.num_prompts >= 1, "num_prompts must be at least 1"),
            (self.prompt_depth >= 1, "prompt_depth must be at least 1"),
            (len(self.templates) >= 1, "templates must name at least one"),
            (all(t.count("{}") == 1 for t in self.templates), "every template must hold '{}' once"),
            (0 < self.crop_scale[0] <= self.crop_scale[1] <= 1, "crop_scale must lie in (0, 1]"),
            (self.precision in PRECISIONS, f"precision must be one of {', '.join(PRECISIONS)}"),
            (self.seed >= 0, "seed must not be negative"),
            (self.checkpoint_minutes > 0, "checkpoint_minutes must be positive"),
            (self.micro_batch >= 0, "micro_batch must not be negative"),
            (not (self.recompute and self.compile), "recompute and compile exclude each other"),
        ]
        for good, message in checks:
            if not good:
                raise ValueError(f"{type(self).__name__}: {message}")

    @property
    def compute_dtype(self) -> torch.dtype:
        """What trains is kept in, and losses are computed in: float32, or float64 with fp64."""
        return torch.float64 if self.precision == "fp64" else torch.float32

    @property
    def peak_lr(self) -> float:
        """`lr`, scaled to the batch size if that is asked for."""
        return self.lr * (self.batch_size / self.lr_batch_size if self.lr_batch_size else 1.0)

    def identity(self) -> dict[str, Any]:
        """All settings that the result depends on."""
        defaults = {f.name: f.default for f in fields(TrainConfig)}
        return {k: defaults[k] if k in _HOW else v for k, v in asdict(self).items()}

    def num_steps(self, steps_per_epoch: int) -> int:
        """Steps that a run takes, given how many make an epoch."""
        steps = max(self.epochs * steps_per_epoch, self.min_steps)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def learning_rate(self, step: int, steps_per_epoch: int, num_steps: int) -> float:
        """The rate at a step (from 0).

        Paper: epoch 0 at 1e-5, epoch e >= 1 at lr·(1 + cos(π(e-1)/E))/2.
        """
        if self.schedule == "paper":
            epoch = step // steps_per_epoch
            if epoch == 0:
                return PAPER_FIRST_LR
            return self.peak_lr * (1 + math.cos(math.pi * (epoch - 1) / self.epochs)) / 2
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        share = (step - self.warmup_steps) / max(num_steps - self.warmup_steps, 1)
        return self.peak_lr * (1 + math.cos(math.pi * share)) / 2

    def make_optimizer(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser over `parameters`."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(
                parameters, lr=self.lr, momentum=0.9, weight_decay=self.weight_decay
            )
        return torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay, fused=True)


class EpochBatches(Protocol[B_co]):
    """Batches by epoch; what batch `n` of an epoch is must not depend on where one starts."""

    @property
    def steps_per_epoch(self) -> int:
        """Batches an epoch."""
        ...

    def batches(self, epoch: int, first: int) -> Iterator[B_co]:
        """The batches of an epoch from number `first` on."""
        ...


class Run:
    """The folder of one stage's run; without a folder nothing is kept.

    Of several ranks the first one alone reads and writes.

    Raises:
        CheckpointError: the folder holds another run, or holds this one and `resume` is off.
    """

    def __init__(
        self,
        folder: Path | None,
        stage: str,
        identity: Mapping[str, Any],
        *,
        resume: bool,
        ranks: Ranks = ALONE,
    ) -> None:
        self.folder, self.stage, self.ranks = folder, stage, ranks
        if folder is not None:
            ranks.first(lambda: self._open(folder, identity, resume))

    def _open(self, folder: Path, identity: Mapping[str, Any], resume: bool) -> None:
        sheet = folder / f"{self.stage}_run.json"
        wanted = json.loads(json.dumps(identity))
        if sheet.is_file():
            self._compare(sheet, wanted, resume)
        elif folder.is_dir() and any(folder.glob("*.safetensors")):
            raise CheckpointError(
                f"'{folder}' already holds something else; give another output folder"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"the output folder '{folder}' can't be made: {error}") from error
        sweep(folder)
        if not sheet.is_file():
            write_json(sheet, wanted)

    @staticmethod
    def _compare(sheet: Path, wanted: dict[str, Any], resume: bool) -> None:
        found = json.loads(sheet.read_text(encoding="utf-8"))
        different = [k for k in wanted if found.get(k) != wanted[k]]
        if different:
            key = different[0]
            raise CheckpointError(
                f"'{sheet.parent}' holds another run: its {key} is {_short(found.get(key))}, now "
                f"{_short(wanted[key])}; give another output folder"
            )
        if not resume:
            raise CheckpointError(
                f"'{sheet.parent}' already holds this run; go on with resume=True (--resume), "
                "or give another output folder"
            )

    def save(self, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:
        """Write the checkpoint, replacing the last one in a single step."""
        if self.folder is not None and self.ranks.is_first:
            write_tensors(self.folder / _CHECKPOINT, tensors, {"data": json.dumps(data)})

    def restore(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The checkpoint, if there is one."""
        return self.ranks.first(self._read)

    def _read(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        if self.folder is None or not (self.folder / _CHECKPOINT).is_file():
            return None
        tensors, metadata = read_tensors(self.folder / _CHECKPOINT)
        return tensors, json.loads(metadata["data"])

    def finish(self) -> None:
        """The result is stored: the checkpoint is no longer needed."""
        if self.folder is not None and self.ranks.is_first:
            (self.folder / _CHECKPOINT).unlink(missing_ok=True)
        self.ranks.wait()

    def has(self, name: str) -> bool:
        """Whether the folder holds a file of this name, as the first rank sees it."""
        folder = self.folder
        return folder is not None and self.ranks.first(lambda: (folder / name).is_file())


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


@dataclass(slots=True)
class Training(Generic[B]):
    """One training: what trains, on what, and what happens on the way.

    Attributes:
        step: batch → named 0-dim losses of the whole batch; "loss" is the one to go down. Empty
            where too few of the batch's pictures could be read: it counts, but changes nothing.
        partial: those of `parameters` whose gradients each rank knows a part of, to be added up.
        modules: everything whose state a checkpoint holds, by name.
        on_step: called after a step with the number of steps done; may return values to log.
        on_epoch: called after the last step of an epoch with its number, from 1.
        history: values that `on_step` returned, kept through checkpoints.
    """

    config: TrainConfig
    parameters: Sequence[nn.Parameter]
    modules: Mapping[str, nn.Module]
    batches: EpochBatches[B]
    step: Callable[[B], dict[str, Tensor]]
    run: Run
    progress: Progress
    partial: Sequence[nn.Parameter] = ()
    on_step: Callable[[int], dict[str, float] | None] = lambda _: None
    on_epoch: Callable[[int], None] = lambda _: None
    on_gradients: Callable[[int, dict[str, Tensor]], None] = lambda _step, _losses: None
    history: list[dict[str, float]] = field(default_factory=list)

    def execute(self) -> int:
        """Train to the end, from the run's checkpoint if it has one; returns the steps taken.

        Raises:
            TrainingError: the loss is not finite or has diverged; the checkpoint is the last good.
        """
        optimizer = self.config.make_optimizer(self.parameters)
        per_epoch = self.batches.steps_per_epoch
        num_steps = self.config.num_steps(per_epoch)
        done = self._restore(optimizer)
        watch = _Watch(self.run)
        folder = self.run.folder if self.run.ranks.is_first else None
        self.progress.start(self.run.stage, num_steps, done, self.config.batch_size, folder)
        saved_at = time.monotonic()
        try:
            while done < num_steps:
                epoch, first = divmod(done, per_epoch)
                for batch in self.batches.batches(epoch, first):
                    rate = self.config.learning_rate(done, per_epoch, num_steps)
                    losses = self._one_step(optimizer, batch, rate, done)
                    if losses:
                        watch.check(losses["loss"], done)
                    done += 1
                    ends_epoch = done % per_epoch == 0
                    if ends_epoch:
                        self.run.ranks.copy_first(self.modules.values())
                        self.on_epoch(done // per_epoch)
                    self._report(done, rate, losses, num_steps)
                    if done >= num_steps:
                        break
                    waited = time.monotonic() - saved_at
                    wanted = (
                        _EPOCH_CHECKPOINT_SECONDS
                        if ends_epoch
                        else 60 * self.config.checkpoint_minutes
                    )
                    if waited >= wanted:
                        self._save(optimizer, done)
                        saved_at = time.monotonic()
        except KeyboardInterrupt:
            self._save(optimizer, done)
            raise
        finally:
            self.progress.stop()
        self._save(optimizer, done)
        return done

    def _one_step(
        self, optimizer: torch.optim.Optimizer, batch: B, rate: float, done: int
    ) -> dict[str, Tensor]:
        for group in optimizer.param_groups:
            group["lr"] = rate
        losses = self.step(batch)
        if not losses:
            return losses
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        self.run.ranks.add_gradients(self.partial)
        self.on_gradients(done, losses)
        optimizer.step()
        return losses

    def _report(self, done: int, rate: float, losses: Mapping[str, Tensor], num_steps: int) -> None:
        extra = self.on_step(done)
        if extra is not None:
            self.history.append({"step": float(done), **extra})
        if extra is not None or self.progress.due(done, num_steps):
            values = {name: float(value.detach()) for name, value in losses.items()}
            self.progress.update(done, {**values, "lr": rate, **(extra or {})})

    def _save(self, optimizer: torch.optim.Optimizer, done: int) -> None:
        if self.run.folder is None or not self.run.ranks.is_first:
            return
        tensors = {
            f"{n}.{k}": v for n, m in self.modules.items() for k, v in m.state_dict().items()
        }
        for index, entry in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": v for k, v in entry.items() if v is not None}
        self.run.save(tensors, {"step": done, "history": self.history})

    def _restore(self, optimizer: torch.optim.Optimizer) -> int:
        found = self.run.restore()
        if found is None:
            return 0
        tensors, data = found
        try:
            for name, module in self.modules.items():
                own = {
                    k[len(name) + 1 :]: v for k, v in tensors.items() if k.startswith(name + ".")
                }
                module.load_state_dict(own)
        except RuntimeError as error:
            raise CheckpointError(
                f"the checkpoint in '{self.run.folder}' has other shapes: {error}"
            ) from error
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, entry = key.split(".")
                state.setdefault(int(index), {})[entry] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        self.history[:] = data["history"]
        return int(data["step"])


class _Watch:
    """Stops a run whose loss is not finite or has grown far beyond where it began."""

    window = 50
    factor = 20.0

    def __init__(self, run: Run) -> None:
        self._run = run
        self._first: list[float] = []
        self._recent: list[float] = []
        self._waiting: list[tuple[int, Tensor]] = []

    def check(self, loss: Tensor, step: int) -> None:
        self._waiting.append((step, loss.detach()))
        # Reading a loss waits for the GPU, so there it is read in bundles.
        if len(self._waiting) < (20 if loss.is_cuda else 1):
            return
        for at, value in self._waiting:
            self._judge(float(value), at)
        self._waiting.clear()

    def _judge(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            raise TrainingError(f"the loss is {loss} at step {step + 1}; {self._way_out()}")
        if len(self._first) < self.window:
            self._first.append(loss)
            return
        self._recent = [*self._recent[-(self.window - 1) :], loss]
        start, now = sum(self._first) / self.window, sum(self._recent) / len(self._recent)
        if len(self._recent) == self.window and now > self.factor * max(start, 1e-3):
            raise TrainingError(
                f"the loss has diverged, from {start:.3g} to {now:.3g} at step {step + 1}; {self._way_out()}"
            )

    def _way_out(self) -> str:
        kept = self._run.has(_CHECKPOINT)
        where = f"the last good checkpoint is in '{self._run.folder}'; " if kept else ""
        return f"{where}lower lr, or use precision 'fp32'"
