"""What a user sees of a long run: a bar on a terminal, plain lines elsewhere, and a JSONL log."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

_LINE_SECONDS = 10.0
_LOG_EVERY = 50


class Progress:
    """Reports steps; `quiet` keeps the log and drops the rest. Everything goes to stderr."""

    def __init__(self, *, quiet: bool = False, tensorboard: bool = False) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
        self._quiet = quiet
        self._tensorboard = tensorboard
        self._bar: Bar | None = None
        self._task: Any = None
        self._log: Path | None = None
        self._writer: Any = None

    def say(self, message: str, style: str | None = None) -> None:
        """One line for the user."""
        self.console.print(message, style=style, markup=False)

    def start(
        self, stage: str, num_steps: int, done: int, batch_size: int, folder: Path | None
    ) -> None:
        """Begin a stage of `num_steps`, of which `done` are behind."""
        self._stage, self._num_steps, self._batch_size = stage, num_steps, batch_size
        self._began, self._began_at = time.monotonic(), done
        self._line_at = self._began
        if folder is not None:
            self._log = folder / f"{stage}_log.jsonl"
            _truncate_log(self._log, done)
            if self._tensorboard:
                self._writer = _tensorboard_writer(folder)
        if done:
            self.say(f"{stage}: going on at step {done} of {num_steps}")
        if self.console.is_terminal and not self._quiet:
            self._bar = _bar(self.console)
            self._bar.start()
            self._task = self._bar.add_task(stage, total=num_steps, completed=done, values="")

    def due(self, done: int, num_steps: int) -> bool:
        """Whether values of this step are wanted."""
        return (
            done == num_steps
            or done % _LOG_EVERY == 0
            or (self._bar is not None and done % 10 == 0)
        )

    def update(self, done: int, values: Mapping[str, float]) -> None:
        """Show and log the values of a step."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        speed = (done - self._began_at) * self._batch_size / seconds
        shown = " ".join(f"{k} {v:.4g}" for k, v in values.items() if k in _SHOWN)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, values=f"{shown} {speed:.0f} img/s")
        elif time.monotonic() - self._line_at >= _LINE_SECONDS or done == self._num_steps:
            self._line_at = time.monotonic()
            left = (self._num_steps - done) * seconds / max(done - self._began_at, 1)
            self.say(
                f"{self._stage} {done}/{self._num_steps} {shown} {speed:.0f} img/s, {left:.0f} s left"
            )
        self._write({"step": done, **values, "images_per_second": speed})

    def stop(self) -> None:
        """End of the stage, whatever ended it."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self, row: Mapping[str, float]) -> None:
        if self._writer is not None:
            for key, value in row.items():
                self._writer.add_scalar(f"{self._stage}/{key}", value, int(row["step"]))
        if self._log is not None:
            with self._log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


_SHOWN = ("loss", "agreement", "lr")


def _bar(console: Any) -> Bar:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    return Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[values]}"),
        TimeRemainingColumn(),
        console=console,
    )


def _truncate_log(path: Path, done: int) -> None:
    """Drop the lines of steps that a resumed run takes again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= done:
                kept.append(line)
        except (ValueError, KeyError):
            continue  # a line cut short by a kill
    path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def _tensorboard_writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("TensorBoard is not installed: pip install promptkd[tensorboard]", file=sys.stderr)
        return None
    return SummaryWriter(str(folder / "tensorboard"))
