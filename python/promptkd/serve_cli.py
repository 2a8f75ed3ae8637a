"""promptkd serve: a page to try a student on."""

from __future__ import annotations

from dataclasses import dataclass

import tyro

from promptkd.hub_cli import open_student


@dataclass(kw_only=True)
class Serve:
    """Open a page to try a student on: drop pictures, see labels, edit the class list.

    Reachable from this machine alone, unless --host says otherwise.

    Example: promptkd serve student
    """

    student: tyro.conf.Positional[str]
    """A student folder, or 'hf://org/name'."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets everyone in who can reach this machine."""
    port: int | None = None
    """Default: the first free one from 7860 on."""
    teacher: str | None = None
    """For new class names: see 'promptkd classes add --help'."""
    max_megabytes: int = 20
    """Largest file that may be uploaded."""
    max_megapixels: int = 50
    """Largest picture that is decoded."""
    backbone: str | None = None
    """The student's CLIP, when its stored name is not to be found here."""

    def run(self) -> None:
        """Serve until interrupted."""
        from promptkd.serve import Limits, serve

        student = open_student(self.student, backbone=self.backbone)
        limits = Limits(
            file_bytes=self.max_megabytes * 2**20, pixels=self.max_megapixels * 1_000_000
        )
        serve(student, host=self.host, port=self.port, teacher=self.teacher, limits=limits)
