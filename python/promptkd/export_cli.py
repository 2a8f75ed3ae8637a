"""promptkd export: a student as one file for onnxruntime or torch.export."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from promptkd.errors import DataError
from promptkd.hub_cli import open_student

if TYPE_CHECKING:
    from promptkd.student import Student

Json = Annotated[bool, tyro.conf.arg(name="json", help="Print the result as JSON on stdout.")]


@dataclass(kw_only=True)
class Export:
    """Write a student as one graph: pictures in, logits and probabilities out.

    The file says what it must be fed, and from which student it comes. Its logits are compared
    with the student's before it is kept.

    Example: promptkd export student --format onnx --output student.onnx
    """

    student: tyro.conf.Positional[str]
    """A student folder, or 'hf://org/name'."""
    format: Literal["onnx", "torch-export"] = "onnx"
    """'onnx' for onnxruntime and others, 'torch-export' for torch.export.load."""
    output: Path | None = None
    """The file; default: student.onnx or student.pt2 in the student's folder."""
    precision: Literal["fp32", "fp16"] = "fp32"
    """Of the image tower."""
    feed: Literal["uint8", "pixels"] = "uint8"
    """What the graph takes: 'uint8' (B, H, W, 3), or 'pixels', normalised (B, 3, H, W)."""
    int8: bool = False
    """Weights of matrix products in int8; needs --pictures, to tell what it costs."""
    opset: int = 20
    """Of ONNX."""
    pictures: str | None = None
    """Compare the file with the student on these: a labelled folder or list, or any folder."""
    verify: Path | None = None
    """Write nothing: check that this file was exported from the student."""
    backbone: str | None = None
    """The student's CLIP, when its stored name is not to be found here."""
    json_: Json = False

    def run(self) -> None:
        """Write the file, or look at one, and say what it is."""
        from promptkd import export

        if self.int8 and self.pictures is None:
            raise DataError("int8 costs accuracy: name --pictures to measure it on")
        student = open_student(self.student, backbone=self.backbone)
        if self.verify is not None:
            target, info = self.verify, export.verify_export(self.verify, student)
        else:
            target = self.output or self._beside(export.SUFFIXES[self.format])
            info = export.export(
                student,
                target,
                format=self.format,
                precision=self.precision,
                feed=self.feed,
                int8=self.int8,
                opset=self.opset,
            )
        facts: dict[str, Any] = {"output": str(target), "bytes": target.stat().st_size}
        facts |= asdict(info)
        lines = [
            f"'{target}': {info.format}{f' opset {info.opset}' if info.opset else ''}, "
            f"{info.precision}, takes {info.feed}, {facts['bytes'] / 1e6:.1f} MB, "
            f"student {info.fingerprint[:8]}"
        ]
        if self.pictures is not None:
            facts["comparison"], line = self._compare(student, target, self.pictures)
            lines.append(line)
        print(json.dumps(facts, indent=1, ensure_ascii=False) if self.json_ else "\n".join(lines))

    def _beside(self, suffix: str) -> Path:
        """The file in the student's folder, where that is one."""
        folder = Path(self.student).expanduser()
        return (folder if folder.is_dir() else Path()) / f"student{suffix}"

    def _compare(self, student: Student, target: Path, pictures: str) -> tuple[dict[str, Any], str]:
        from promptkd.export import compare

        found = compare(target, student, pictures)
        line = (
            f"on {found.num_images} pictures: logits differ by at most {found.max_difference:.1e}, "
            f"the best class is the same on {found.agreement:.1f} %"
        )
        if found.accuracy is not None and found.student_accuracy is not None:
            change = found.accuracy - found.student_accuracy
            line += (
                f", accuracy {found.student_accuracy:.1f} % → {found.accuracy:.1f} % "
                f"({change:+.1f})"
            )
        return asdict(found), line
