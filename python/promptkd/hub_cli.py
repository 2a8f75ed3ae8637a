"""promptkd push: a student and its model card to the Hugging Face hub."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from promptkd.student import Student

Json = Annotated[bool, tyro.conf.arg(name="json", help="Print the result as JSON on stdout.")]


def open_student(place: str, **options: Any) -> Student:
    """A student's folder, or 'hf://org/name'; a bare name is never asked for in the network."""
    from promptkd.student import Student

    if place.startswith("hf://"):
        return Student.from_pretrained(place, **options)
    return Student.load(place, **options)


@dataclass(kw_only=True)
class Push:
    """Send a student to the Hugging Face hub, with a model card written from its run.

    Needs a token with write access: 'hf auth login', or HF_TOKEN. Everything that takes a student
    takes 'hf://org/name' as well.

    Example: promptkd push student org/name --license mit --labelled test-photos
    """

    student: tyro.conf.Positional[str]
    """A student folder."""
    repository: tyro.conf.Positional[str]
    """'org/name'; made if it isn't there."""
    license: str | None = None
    """For the card, as the hub spells it; default: other."""
    labelled: str | None = None
    """Labelled pictures to measure the card's accuracies on (of a split its `test` part)."""
    backbone: str | None = None
    """The student's CLIP, when its stored name is not to be found here."""
    private: bool = False
    """Make the repository private."""
    without_backbone: bool = False
    """Leave the frozen image tower out; the student then needs it by name."""
    message: str = "Add a promptkd student"
    """Of the commit."""
    json_: Json = False

    def run(self) -> None:
        """Print where it went."""
        student = open_student(self.student, backbone=self.backbone)
        results = {} if self.labelled is None else {"test": student.evaluate(self.labelled)}
        url = student.push_to_hub(
            self.repository,
            license=self.license,
            results=results,
            private=self.private or None,
            include_backbone=not self.without_backbone,
            commit_message=self.message,
        )
        facts = {"repository": self.repository, "commit": url}
        print(json.dumps(facts, indent=1) if self.json_ else f"'{self.repository}': {url}")
