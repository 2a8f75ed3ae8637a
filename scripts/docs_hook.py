"""For mkdocs: the command line's page is made from the commands' own help."""

import io
import textwrap
from collections.abc import Iterator
from contextlib import redirect_stdout
from typing import Any, get_args, get_type_hints

from promptkd.cli import Command, main

MARK = "<!-- the help of every command -->"
_WIDTH = 84  # of the page's code blocks


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in the help where a page asks for it."""
    if MARK not in markdown:
        return markdown
    parts = [f"## promptkd {name}\n\n```text\n{help_of(name)}\n```\n" for name in commands(Command)]
    return markdown.replace(MARK, "\n".join(parts))


def commands(union: Any, prefix: str = "") -> Iterator[str]:
    """Every verb of the command line, "cache build" as two words."""
    for verb in get_args(union):
        kind, settings = get_args(verb)
        name = f"{prefix}{settings.name}"
        action = get_type_hints(kind, include_extras=True).get("action")
        if action is None:
            yield name
        else:
            yield from commands(get_args(action)[0], f"{name} ")


def help_of(command: str) -> str:
    """What `promptkd COMMAND --help` prints."""
    shown = io.StringIO()
    try:
        with redirect_stdout(shown):
            main([*command.split(), "--help"])
    except SystemExit as stop:
        if stop.code != 0:
            raise RuntimeError(f"promptkd {command} --help failed") from stop
    lines = shown.getvalue().strip().splitlines()
    # Sentences come in one line; columns are laid out already, commands are there to be copied.
    return "\n".join(
        "\n".join(textwrap.wrap(line, _WIDTH, break_on_hyphens=False))
        if len(line) > _WIDTH and not line.startswith((" ", "Example: "))
        else line
        for line in lines
    )
