"""A page to try a student on: drop pictures, see labels and bars, edit the class list."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from promptkd.class_names import check_class_names
from promptkd.errors import DataError, ImageError, ModelError, PromptKDError
from promptkd.report.page import thumbnail
from promptkd.student import Prediction, Student

LOCAL = "127.0.0.1"
_KEPT_LISTS = 8
_NEAREST = 3
_STYLE = """
.result { display: flex; gap: 1rem; margin: 0 0 1rem; align-items: flex-start; }
.result img { width: 7rem; height: 7rem; object-fit: contain; border-radius: .4rem; flex: none; }
.result .said { flex: 1; min-width: 0; }
.result .row { display: grid; grid-template-columns: minmax(5rem, 14rem) minmax(2rem, 1fr) 4rem; gap: .6rem; }
.result .row span:last-child { text-align: right; font-variant-numeric: tabular-nums; }
.result .track { background: rgba(128, 128, 128, .2); border-radius: .3rem; align-self: center; }
.result .fill { background: #2f6fb5; border-radius: .3rem; height: .7rem; display: block; }
.result .soft { opacity: .75; font-size: .85rem; margin: .3rem 0 0; }
.wrong { color: #b3261e; }
@media (max-width: 40rem) {
  .result { gap: .6rem; }
  .result img { width: 4rem; height: 4rem; }
  .result .row { grid-template-columns: 1fr 1fr 3.6rem; gap: .4rem; }
}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What an upload may be."""

    file_bytes: int = 20 * 2**20
    pixels: int = 50_000_000
    pictures: int = 50
    classes: int = 1000


class Trial:
    """Answers for the page; students for edited class lists are kept, the last few of them."""

    def __init__(
        self, student: Student, *, teacher: Any = None, limits: Limits | None = None
    ) -> None:
        self.student, self.limits = student, limits or Limits()
        self._teacher = teacher
        self._students: OrderedDict[tuple[str, ...], Student] = OrderedDict()

    def answer(self, files: Sequence[str] | None, names: str) -> str:
        """HTML about uploaded files, by a student for the names, one a line."""
        try:
            student = self._student_for(names)
        except PromptKDError as error:
            return _wrong(str(error))
        files = list(files or ())
        if not files:
            return f"<p>{len(student.class_names)} classes. Drop a picture.</p>"
        shown = [self._one(student, file) for file in files[: self.limits.pictures]]
        if len(files) > len(shown):
            shown.append(_wrong(f"only the first {self.limits.pictures} pictures are looked at"))
        return "".join(shown)

    def _student_for(self, text: str) -> Student:
        names = check_class_names([line.strip() for line in text.splitlines() if line.strip()])
        if len(names) > self.limits.classes:
            raise DataError(
                f"{len(names)} classes are more than this page takes, {self.limits.classes}"
            )
        if names == self.student.class_names:
            return self.student
        if names not in self._students:
            self._students[names] = self.student.with_classes(names, self._teacher)
            if len(self._students) > _KEPT_LISTS:
                self._students.popitem(last=False)
        self._students.move_to_end(names)
        return self._students[names]

    def _one(self, student: Student, file: str) -> str:
        name = Path(file).name
        try:
            check_upload(file, self.limits)
            found = student.predict(file)
        except (ImageError, DataError) as error:
            return _wrong(str(error).replace(file, name))
        assert isinstance(found, Prediction)
        url = thumbnail(Path(file).parent, name)
        picture = f'<img src="{url}" alt="{escape(name)}">' if url else ""
        odd = "<p class='wrong'>Looks out of domain.</p>" if found.out_of_domain else ""
        return (
            f'<div class="result">{picture}<div class="said"><strong>{escape(name)}</strong>'
            f"{_bars(found)}{odd}{_nearest(student, found.labels[0])}</div></div>"
        )


def check_upload(file: str | os.PathLike[str], limits: Limits) -> None:
    """Refuse what is no picture, and what would take too much memory to decode.

    Raises:
        DataError: one sentence, with the file's name.
    """
    from PIL import Image

    name, size = Path(file).name, Path(file).stat().st_size
    if size > limits.file_bytes:
        raise DataError(
            f"'{name}' has {size / 2**20:.1f} MiB, more than {limits.file_bytes / 2**20:.0f} MiB"
        )
    try:
        with Image.open(file) as image:
            width, height = image.size
    except Image.DecompressionBombError as error:
        raise DataError(f"'{name}' has too many pixels") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"'{name}' is no picture that can be read") from error
    if width * height > limits.pixels:
        raise DataError(
            f"'{name}' has {width} x {height} pixels, more than {limits.pixels / 1e6:.0f} million"
        )


def serve(
    student: Student,
    *,
    host: str = LOCAL,
    port: int | None = None,
    teacher: Any = None,
    limits: Limits | None = None,
    block: bool = True,
) -> Any:
    """Serve the page until interrupted.

    Args:
        student: what is tried.
        host: address to listen on; the default is reachable from this machine alone.
        port: default: the first free one from 7860 on.
        teacher: for new class names, see `Student.with_classes`.
        limits: of uploads.
        block: wait until interrupted; else return at once.

    Returns:
        gradio's application, with `local_url` and `close()`.

    Raises:
        ModelError: gradio is not installed, or the address is taken.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # it calls home otherwise
    try:
        import gradio
    except ImportError as error:
        raise ModelError("serving needs gradio: pip install 'promptkd[serve]'") from error
    trial = Trial(student, teacher=teacher, limits=limits)
    page = _page(gradio, trial)
    try:
        page.launch(
            server_name=host,
            server_port=port,
            max_file_size=trial.limits.file_bytes,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            css=_STYLE,
        )
    except OSError as error:
        raise ModelError(f"{host}:{port or 7860} can't be listened on: {error}") from error
    if block:
        print(f"promptkd: {page.local_url} (end with Ctrl+C)", flush=True)
        page.block_thread()
    return page


def _page(gradio: Any, trial: Trial) -> Any:
    """Pictures and class list on the left, answers on the right."""
    with gradio.Blocks(title="promptkd", analytics_enabled=False) as page:
        gradio.Markdown("## promptkd\nDrop pictures; edit the classes, one a line.")
        with gradio.Row():
            with gradio.Column(scale=1):
                files = gradio.File(file_count="multiple", type="filepath", label="Pictures")
                names = gradio.Textbox(
                    "\n".join(trial.student.class_names), lines=12, label="Classes"
                )
                button = gradio.Button("Use these classes", variant="primary")
            with gradio.Column(scale=2):
                answer = gradio.HTML(trial.answer(None, "\n".join(trial.student.class_names)))
        for event in (files.change, button.click):
            # One answer at a time, of both together: they share the students of edited lists.
            event(
                trial.answer, [files, names], answer, concurrency_limit=1, concurrency_id="answer"
            )
    return page


def _bars(found: Prediction) -> str:
    """A row a class: its name, a bar, its probability."""
    rows = zip(found.labels, found.probabilities, strict=True)
    return "".join(
        f'<div class="row"><span>{escape(label)}</span><span class="track"><i class="fill" '
        f'style="width:{100 * share:.1f}%"></i></span><span>{100 * share:.1f} %</span></div>'
        for label, share in rows
    )


def _nearest(student: Student, label: str) -> str:
    """The classes whose vectors are nearest to that of a label, by cosine."""
    place = student.class_names.index(label)
    cosines = student.class_vectors @ student.class_vectors[place]
    order = cosines.argsort(descending=True).tolist()
    near = [row for row in order if row != place][:_NEAREST]
    if not near:
        return ""
    shown = ", ".join(f"{escape(student.class_names[r])} ({float(cosines[r]):.2f})" for r in near)
    return f'<p class="soft">Nearest to {escape(label)}: {shown}</p>'


def _wrong(message: str) -> str:
    return f'<p class="wrong">{escape(message)}</p>'
