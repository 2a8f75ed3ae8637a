"""promptkd models: what open_clip knows, and what each model can be here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from promptkd.families import Architecture

Json = Annotated[bool, tyro.conf.arg(name="json", help="Print the result as JSON on stdout.")]


@dataclass(kw_only=True)
class Models:
    """List the models of open_clip: sizes, published accuracy, and what each can be.

    Example: promptkd models siglip
    """

    pattern: tyro.conf.Positional[str] = ""
    """Only architectures with this in their name; few are listed with all their tags."""
    families: bool = False
    """Print the table of families instead: where prompts go and what is read."""
    json_: Json = False

    def run(self) -> None:
        """Print the table."""
        from promptkd.families import architectures, family_table

        if self.families:
            print(family_table())
            return
        found = list(architectures(self.pattern))
        if self.json_:
            print(json.dumps([_facts(a) for a in found], indent=1))
            return
        from rich.console import Console

        console = Console()
        if not console.is_terminal:
            console.width = _FILE_WIDTH
        console.print(_table(found))


def _facts(found: Architecture) -> dict[str, Any]:
    return {
        "architecture": found.name,
        "family": found.family,
        "image_size": list(found.vision.size),
        "image_parameters": found.vision.parameters,
        "image_gflop": round(found.vision.gflop, 2),
        "roles": list(found.roles),
        "refusal": found.vision.refusal or None,
        "imagenet_zero_shot": dict(found.tags),
    }


_FILE_WIDTH = 120  # of a line where no terminal says how wide it is
_ALL_TAGS = 12  # so many architectures are shown with every tag


def _table(found: list[Architecture]) -> Any:
    from rich.table import Table

    table = Table(caption="parameters and GFLOP of the image tower; published zero-shot ImageNet")
    for title in ("architecture", "px", "M", "GFLOP", "tag", "ImageNet", "can be"):
        table.add_column(title, justify="right" if title in ("px", "M", "GFLOP") else "left")
    for one in found:
        height, width = one.vision.size
        head = (
            one.name,
            str(height) if height == width else f"{height}x{width}",
            f"{one.vision.parameters / 1e6:.0f}",
            f"{one.vision.gflop:.1f}",
        )
        for number, (tag, accuracy) in enumerate(_rows(one, every=len(found) <= _ALL_TAGS)):
            first = number == 0
            shown = "-" if accuracy is None else f"{accuracy:.1f}"
            table.add_row(
                *(head if first else [""] * 4), tag, shown, ", ".join(one.roles) if first else ""
            )
    return table


def _rows(one: Architecture, *, every: bool) -> list[tuple[str, float | None]]:
    """Its tags with their accuracy, best first; or the best one alone."""
    ranked = sorted(one.tags.items(), key=lambda item: (-(item[1] or 0), item[0]))
    if not ranked:
        return [("-", None)]
    if every or len(ranked) == 1:
        return ranked
    return [(f"{ranked[0][0]} (of {len(ranked)})", ranked[0][1])]
