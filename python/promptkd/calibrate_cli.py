"""promptkd calibrate: a student's probabilities set right on labelled pictures."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

Json = Annotated[bool, tyro.conf.arg(name="json", help="Print the result as JSON on stdout.")]


@dataclass(kw_only=True)
class Calibrate:
    """Fit the temperature of a student's probabilities on labelled pictures not trained on.

    Distilling does so by itself, on the teacher's probabilities of the pictures kept aside; labels
    are better. Also sets the threshold below which a picture looks out of domain.

    Example: promptkd calibrate student validation-photos
    """

    student: tyro.conf.Positional[Path]
    """A student folder; its probabilities change, the order of its answers doesn't."""
    labelled: tyro.conf.Positional[str]
    """A folder with one sub-folder a class (of a split its `val` part), or a list file."""
    rate: float = 0.05
    """Share of these pictures that are to look out of domain."""
    score: Literal["energy", "probability"] = "energy"
    """What tells foreign pictures: the energy of the logits, or the highest probability."""
    backbone: str | None = None
    """The student's CLIP, when its stored name is not to be found here."""
    json_: Json = False

    def run(self) -> None:
        """Write the temperature and say what it changes."""
        from promptkd.files import STUDENT, read_folder, write_json
        from promptkd.student import Student

        student = Student.load(self.student, backbone=self.backbone)
        found = student.calibrate(self.labelled, rate=self.rate, score=self.score)
        _, sheet = read_folder(self.student, "student", STUDENT)
        sheet |= {"temperature": found.temperature, "calibration": asdict(found)}
        write_json(self.student.expanduser() / "student.json", sheet)
        line = (
            f"temperature {found.temperature:.3g}, fitted on {found.num_images} pictures: "
            f"calibration error {found.before.error:.1f} % → {found.after.error:.1f} %"
        )
        print(json.dumps(asdict(found), indent=1) if self.json_ else line)
