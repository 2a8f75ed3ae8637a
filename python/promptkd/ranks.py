"""The processes of a torchrun job: which device each has, its share of the work, what they exchange.

Every rank holds all that trains and computes the loss of the whole batch; only the towers' work is
divided. BatchNorm then sees the whole batch, and the result is that of a single process.
"""

from __future__ import annotations

import atexit
import os
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from promptkd.errors import PromptKDError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")

_PATIENCE = timedelta(hours=12)
"""Ranks wait so long for each other: shares of a cache may take unequal times. A rank that died is
noticed by torchrun, which ends the others."""
_GLANCE = 0.02
"""Seconds after which the first rank looks again for one that has not come."""
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those of the job; every rank must call the same methods in the same order."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this one prints and writes."""
        return self.rank == 0

    def share(self, count: int, rank: int | None = None) -> range:
        """The run of 0..count-1 that is this rank's (or another one's); they differ by at most one."""
        rank = self.rank if rank is None else rank
        return range(count * rank // self.size, count * (rank + 1) // self.size)

    def cut(self, rows: Sequence[T]) -> Sequence[T]:
        """This rank's share of a sequence."""
        mine = self.share(len(rows))
        return rows[mine.start : mine.stop]

    def counts(self, count: int) -> list[int]:
        """Every rank's `count`, by rank."""
        if self.size == 1:
            return [count]
        mine = torch.tensor([count])
        found = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(found, mine)
        return [int(c) for c in found]

    def gather(self, rows: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """Rows (n, …) of all ranks, one rank after the other, (Σn, …).

        It can be differentiated where every rank goes on to compute the same loss from the
        outcome: each then takes its own part of that gradient, and gradients of what lies behind
        the rows are to be added up over the ranks (`add_gradients`).

        Args:
            rows: as many as this rank has, perhaps none.
            counts: of rows by rank, where they are known.
        """
        if self.size == 1:
            return rows
        counts = self.counts(len(rows)) if counts is None else counts
        gathered: Tensor = _Gather.apply(rows, counts, self.rank)
        return gathered

    def add_up(self, tensor: Tensor) -> None:
        """Put the sum over ranks in its place."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Put the sums of gradients over ranks in their place; where a rank has none, it has zero.

        The gradients are few (prompts), so they travel together, after the backward pass.
        """
        if self.size == 1:
            return
        kept = list(parameters)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in kept]
        flat = torch.cat([g.reshape(-1) for g in grads])
        dist.all_reduce(flat)
        parts = flat.split([g.numel() for g in grads])
        for parameter, part in zip(kept, parts, strict=True):
            parameter.grad = part.view_as(parameter).clone()

    def objects(self, value: T) -> list[T]:
        """Every rank's value, by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def first(self, function: Callable[[], T]) -> T:
        """Call a function on the first rank; its result or promptkd error, on all of them."""
        if self.size == 1:
            return function()
        box: list[Any] = [None, None]
        if self.is_first:
            try:
                box[0] = function()
            except PromptKDError as error:
                box[1] = error
        dist.broadcast_object_list(box, src=0)
        if box[1] is not None:
            box[1].told = not self.is_first
            raise box[1]
        result: T = box[0]
        return result

    @torch.no_grad()
    def copy_first(self, modules: Iterable[nn.Module]) -> None:
        """Give all ranks the first one's values: processors of different kinds drift apart."""
        if self.size == 1:
            return
        for module in modules:
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, src=0)

    def wait(self) -> None:
        """Until all ranks have come here."""
        if self.size > 1:
            self.counts(0)


ALONE = Ranks()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: Sequence[int], rank: int) -> Tensor:
        ctx.start, ctx.count = sum(counts[:rank]), counts[rank]
        padded = rows.new_zeros(max(counts), *rows.shape[1:])  # all parts must have one shape
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0][ctx.start : ctx.start + ctx.count], None, None


def in_job() -> bool:
    """Whether this process is one of several that torchrun (or alike) started together."""
    return all(v in os.environ for v in _VARIABLES) and int(os.environ["WORLD_SIZE"]) > 1


def prints() -> bool:
    """Whether this process is the one of its job that speaks."""
    return not in_job() or os.environ["RANK"] == "0"


def name_of_process() -> str:
    """How this process signs what it says."""
    return "promptkd" if prints() else f"promptkd, rank {os.environ['RANK']}"


def join(device: torch.device) -> Ranks:
    """The ranks of this job, connected on first use; `ALONE` outside of torchrun.

    Args:
        device: where this process computes: GPUs exchange by NCCL, everything else by gloo.
    """
    if not dist.is_available():
        return ALONE
    if not dist.is_initialized():
        if not in_job():
            return ALONE
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        from torch.distributed.rendezvous import rendezvous  # not in every build of torch

        store, rank, size = next(rendezvous("env://", timeout=_PATIENCE))
        dist.init_process_group(
            backend, store=_fresh(store, rank, size), rank=rank, world_size=size, timeout=_PATIENCE
        )
        atexit.register(_leave)
    return Ranks(dist.get_rank(), dist.get_world_size())


def _fresh(store: Store, rank: int, size: int) -> Store:
    """A part of the job's store in which no earlier life of these ranks has written.

    torchrun keeps the store when it restarts the ranks, and a rank that reads there the address at
    which a dead one listened can't connect, or waits for ever. So the first rank makes up a name,
    and tells it in answer to what the others have made up: nobody takes a dead rank's word.
    """
    from torch.distributed.distributed_c10d import PrefixStore

    if rank > 0:
        question = uuid.uuid4().hex
        store.set(f"promptkd/ask/{rank}", question)
        name = store.get(f"promptkd/answer/{question}").decode()
        store.set(f"promptkd/{name}/{rank}", "here")
    else:
        name = uuid.uuid4().hex
        for other in range(1, size):
            while not store.check([f"promptkd/{name}/{other}"]):
                # The question may be an earlier life's: answered in vain, and read again.
                question = store.get(f"promptkd/ask/{other}").decode()
                store.set(f"promptkd/answer/{question}", name)
                time.sleep(_GLANCE)
    return PrefixStore(f"promptkd/{name}", store)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def pick_device(device: torch.device | str | None) -> torch.device:
    """The device asked for, or the GPU if there is one; in a job, each rank's own GPU."""
    wanted = device if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    place = torch.device(wanted)
    if str(place) == "cuda" and in_job():
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(place)
    return place
