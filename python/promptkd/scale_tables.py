"""Plans, speeds and diagnoses as people read them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from promptkd.doctor import Diagnosis
    from promptkd.plan import Plan, Scale
    from promptkd.throughput import Throughput


def plan_lines(scale: Scale, plan: Plan) -> list[str]:
    """A plan for people."""
    machines = "job" if scale.jobs == 1 else "jobs"
    lines = [
        f"{scale.images:,.0f} pictures, {scale.num_classes:,} classes, {scale.content}, "
        f"{scale.views} views, {scale.epochs:g} epochs of batches of {scale.batch_size:,}",
        f"pictures   {_size(plan.pictures_bytes)} on disk; their list takes "
        f"{_size(plan.list_bytes)} of memory in every process",
        f"cache      {_size(plan.cache_bytes)}: {plan.shards:,} shards of {_size(plan.shard_bytes)}, "
        f"{_size(plan.view_bytes)} a view",
        f"labelling  {plan.label_hours:,.1f} h with {scale.jobs} {machines} "
        f"({plan.label_machine_hours:,.0f} machine hours at {_rate(scale.label_speed)} pictures/s); "
        f"each reads {_size(plan.label_read)}/s",
        f"training   {plan.train_hours:,.1f} h with {scale.ranks} ranks "
        f"({plan.train_machine_hours:,.0f} machine hours at {_rate(scale.train_speed)} pictures/s), "
        f"{plan.steps:,} steps; each reads {_size(plan.train_read)}/s",
        f"network    {_size(plan.exchange)}/s a rank for features and gradients, "
        f"{100 * plan.exchange_share:.2f} % of a step's time",
    ]
    return [*lines, *(f"warning: {text}" for text in plan.warnings)]


def speeds_table(found: Throughput) -> Table:
    """Every way of working by part, with what it waits for."""
    table = Table("", "part", "ms a picture", "share", title="where the time goes")
    for mode, parts in found.modes().items():
        whole, slowest = sum(parts.values()), found.bottleneck(mode)
        for part, seconds in parts.items():
            table.add_row(
                "",
                part,
                f"{1e3 * seconds:.3f}",
                f"{100 * seconds / whole:.0f} %",
                style="bold" if part == slowest else None,
            )
        speed = found.speed(mode)
        table.add_row(mode, f"bottleneck: {slowest}", f"{1e3 / speed:.3f}", f"{speed:,.1f}/s")
        table.add_section()
    return table


def print_diagnosis(found: Diagnosis) -> None:
    """Machine, pictures, speeds, advice, warnings."""
    machine, data, advice = found.machine, found.data, found.advice
    for name, value in machine.items():
        text = _size(value) if name.endswith("_bytes") else value
        print(f"{name.removesuffix('_bytes').replace('_', ' '):16} {text}")
    print(
        f"{'pictures':16} {data.num_images:,}; of {data.looked_at} the mean file is "
        f"{_size(data.picture_bytes)}, the median shorter side {data.median_side} px"
    )
    if advice is not None and found.speeds is not None:
        Console().print(speeds_table(found.speeds))
        memory = ", ".join(f"{n}: {_size(b)}" for n, b in advice.graph_bytes.items())
        print(f"{'student memory':16} by batch size, beside the weights: {memory}")
        micro = f" --micro-batch {advice.micro_batch}" if advice.micro_batch else ""
        print(f"{'advice':16} --batch-size {advice.batch_size}{micro} --views {advice.views}")
        print(f"{'cache':16} {advice.content}, {_size(advice.cache_bytes)}")
        hours = ", ".join(f"{mode} {value:,.2f} h" for mode, value in advice.hours.items())
        print(f"{'time':16} {hours}")
    for text in found.warnings:
        print(f"warning: {text}")
    if not found.warnings:
        print("nothing to warn of")


def _rate(speed: float) -> str:
    return f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}"


def _size(count: float) -> str:
    """Bytes in words: "3.2 GB"."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} PB"
