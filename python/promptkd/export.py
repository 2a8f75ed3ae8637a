"""A student as one graph for other runtimes: ONNX, or torch.export's own format.

Image tower, projector, class vectors, temperature and, for pictures as bytes, the normalisation
are in the graph; what it must be fed is written into the file, with the student's fingerprint.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from promptkd.data.pictures import Picture
from promptkd.errors import CheckpointError, DataError, ModelError
from promptkd.files import temporary_for
from promptkd.student import Student

Format: TypeAlias = Literal["onnx", "torch-export"]
Feed: TypeAlias = Literal["uint8", "pixels"]
Run: TypeAlias = Callable[[Tensor], Tensor]

OPSET = 20
METADATA = "promptkd"
TOLERANCES = {"fp32": 1e-4, "fp16": 0.5, "int8": math.inf}
"""Largest difference of a logit that an export may have; what int8 costs is measured on pictures."""
SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2"}
_PROTOBUF_BYTES = 2**31 - 2**20
_BATCH = 16
_INSTALL = "pip install 'promptkd[export]'"


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """What an exported file holds and must be fed; stored in it as JSON under "promptkd".

    Attributes:
        fingerprint: `Student.fingerprint()` of the student it was made from.
        class_names: C names, in the order of the outputs.
        format: "onnx" or "torch-export".
        precision: "fp32", "fp16" (the image tower) or "int8" (weights of matrix products).
        opset: of ONNX; 0 otherwise.
        feed: "uint8": `images` (B, H, W, 3), RGB; "pixels": normalised float32 (B, 3, H, W).
        size: (H, W).
        mean, std: that "pixels" are normalised with.
        resize_mode, interpolation: how a picture comes to that size.
        orient: whether the EXIF orientation is applied.
        temperature: that the graph's probabilities divide the logits by.
        outputs: names: logits and probabilities, (B, C) float32.
    """

    fingerprint: str
    class_names: tuple[str, ...]
    format: str
    precision: str
    opset: int
    feed: str
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize_mode: str
    interpolation: str
    orient: bool
    temperature: float
    outputs: tuple[str, str] = ("logits", "probabilities")

    @classmethod
    def from_json(cls, text: str) -> ExportInfo:
        """From the text in a file's metadata."""
        data: dict[str, Any] = json.loads(text)
        for key in ("class_names", "size", "mean", "std", "outputs"):
            data[key] = tuple(data[key])
        return cls(**data)

    def as_json(self) -> str:
        """For a file's metadata."""
        return json.dumps(asdict(self), ensure_ascii=False)


class Graph(nn.Module):
    """What is exported: images as they are fed → logits and probabilities, (B, C) float32."""

    def __init__(self, student: Student, feed: Feed, precision: str) -> None:
        super().__init__()
        self.student = copy.deepcopy(student).cpu().float().eval().requires_grad_(False)
        self.student.vision.cast(torch.float16 if precision == "fp16" else torch.float32)
        self._feed = feed
        preprocess = student.clip.preprocess
        self.size = preprocess.size
        for name in ("mean", "std"):
            values = torch.tensor(getattr(preprocess, name), dtype=torch.float32)
            self.register_buffer(name, values.view(3, 1, 1))

    mean: Tensor
    std: Tensor

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return (logits, probabilities)."""
        if self._feed == "uint8":
            # `Preprocess.normalize`, whose constants an exporter must find in the module.
            images = (images.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        logits = self.student(images).float()
        return logits, F.softmax(logits / self.student.info.temperature, dim=-1)

    def example(self, batch: int = 2) -> Tensor:
        """Noise of the shape and type that is fed."""
        height, width = self.size
        random = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (batch, height, width, 3), generator=random)
        if self._feed == "uint8":
            return pixels.to(torch.uint8)
        return (pixels.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std


def export(
    student: Student,
    path: str | os.PathLike[str],
    *,
    format: Format = "onnx",
    precision: Literal["fp32", "fp16"] = "fp32",
    feed: Feed = "uint8",
    int8: bool = False,
    opset: int = OPSET,
) -> ExportInfo:
    """Write a student as one graph, and check in the runtime that it gives the same logits.

    Args:
        student: the student; its precision does not matter.
        path: the file, ending in .onnx or .pt2.
        format: "onnx", or "torch-export" for `torch.export.load`.
        precision: of the image tower.
        feed: what the graph takes; see `ExportInfo`.
        int8: store the weights of matrix products as int8 (onnxruntime's dynamic quantisation).
        opset: of ONNX.

    Raises:
        DataError: settings that don't go together, a wrong suffix, or a file of another student.
        ModelError: packages are missing, or the model is too large for ONNX.
        CheckpointError: the file gives other logits than the student.
    """
    target = Path(path).expanduser()
    _check(target, format, precision, int8)
    info = _info(student, format, "int8" if int8 else precision, feed, opset)
    if target.exists() and (found := read_export(target)).fingerprint != info.fingerprint:
        raise DataError(
            f"'{target}' was exported from another student ({found.fingerprint[:8]}…, not "
            f"{info.fingerprint[:8]}…); remove it or give another file"
        )
    graph = Graph(student, feed, precision)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_for(target).with_suffix(target.suffix)
    try:
        with _quiet():
            if format == "onnx":
                _write_onnx(graph, temporary, info, int8=int8)
            else:
                _write_torch(graph, temporary, info)
        _check_logits(graph, temporary, info)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return info


def read_export(path: str | os.PathLike[str]) -> ExportInfo:
    """What an exported file says of itself.

    Raises:
        CheckpointError: no such file, damaged, or not exported by promptkd.
        ModelError: packages are missing.
    """
    place = Path(path).expanduser()
    if not place.is_file():
        raise CheckpointError(f"'{place}' is no file")
    try:
        if place.suffix == ".pt2":
            extra: Any = {METADATA: ""}
            torch.export.load(place, extra_files=extra)
            text = extra[METADATA]
        else:
            text = _onnxruntime_session(place).get_modelmeta().custom_metadata_map[METADATA]
        return ExportInfo.from_json(text)
    except ModelError:
        raise
    except Exception as error:  # runtimes raise errors of their own
        raise CheckpointError(
            f"'{place}' is damaged or was not exported by promptkd: "
            f"{' '.join(str(error).split())[:160]}"
        ) from error


def verify_export(path: str | os.PathLike[str], student: Student) -> ExportInfo:
    """Check that a file was exported from this student.

    Raises:
        CheckpointError: from another one, or no exported file.
    """
    info = read_export(path)
    if info.fingerprint != student.fingerprint():
        raise CheckpointError(
            f"'{path}' was exported from another student: its fingerprint is "
            f"{info.fingerprint[:8]}…, this one's {student.fingerprint()[:8]}…; export it again"
        )
    return info


def open_export(path: str | os.PathLike[str]) -> Run:
    """A function from images, as the file wants them, to logits (B, C).

    Raises:
        CheckpointError: no file that promptkd exported.
    """
    read_export(path)
    place = Path(path).expanduser()
    if place.suffix == ".pt2":
        module: Any = torch.export.load(place).module()
        return lambda images: module(images)[0]
    session = _onnxruntime_session(place)
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def feed_of(student: Student, info: ExportInfo, images: Any) -> Tensor:
    """Pictures as an exported file wants them, cut and resized as for the student itself."""
    pixels = student.preprocess(images).cpu()
    if info.feed == "pixels":
        return pixels.float()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (info.mean, info.std))
    return ((pixels * std + mean) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _check(target: Path, format: str, precision: str, int8: bool) -> None:
    suffix = SUFFIXES[format]
    if target.suffix != suffix:
        raise DataError(f"'{target}' must end in {suffix} for the format {format}")
    if int8 and (format != "onnx" or precision != "fp32"):
        raise DataError("int8 weights are for format onnx and precision fp32 alone")
    if format == "onnx":
        _need("onnx", "onnxruntime", "onnxscript")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters, which tell of their own insides; what matters is checked afterwards."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _need(*packages: str) -> None:
    from importlib.util import find_spec

    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ModelError(f"exporting to ONNX needs {', '.join(missing)}: {_INSTALL}")


def _info(student: Student, format: str, precision: str, feed: str, opset: int) -> ExportInfo:
    preprocess = student.clip.preprocess
    return ExportInfo(
        fingerprint=student.fingerprint(),
        class_names=student.class_names,
        format=format,
        precision=precision,
        opset=opset if format == "onnx" else 0,
        feed=feed,
        size=preprocess.size,
        mean=preprocess.mean,
        std=preprocess.std,
        resize_mode=preprocess.resize_mode,
        interpolation=preprocess.interpolation,
        orient=student.info.orient,
        temperature=student.info.temperature,
    )


def _write_onnx(graph: Graph, path: Path, info: ExportInfo, *, int8: bool) -> None:
    import onnx
    import torch.onnx

    size = sum(t.numel() * t.element_size() for t in graph.state_dict().values())
    if size > _PROTOBUF_BYTES:
        raise ModelError(
            f"the student has {size / 2**30:.1f} GiB of weights, more than an ONNX file may hold "
            "(2 GiB); export in fp16, or with format torch-export"
        )
    program = torch.onnx.export(
        graph,
        (graph.example(),),
        dynamo=True,
        opset_version=info.opset,
        input_names=["images"],
        output_names=list(info.outputs),
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    if int8:
        model = _quantized(model, path)
    stated = {i.version for i in model.opset_import if i.domain in ("", "ai.onnx")}
    if stated != {info.opset}:
        raise ModelError(f"opset {info.opset} can't be had; the exporter gives {sorted(stated)}")
    onnx.helper.set_model_props(model, {METADATA: info.as_json()})
    onnx.save_model(model, path)


def _quantized(model: Any, path: Path) -> Any:
    """The same graph with int8 weights in its matrix products."""
    import onnx
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    names = ("plain", "folded", "int8")
    plain, folded, small = (path.with_suffix(f".{name}.tmp") for name in names)
    # The exporter writes a weight and its transpose as an operation, the quantiser takes weights
    # alone: have such operations done once, and the outcome stored.
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folded)
    options.log_severity_level = 3
    try:
        onnx.save_model(model, plain)
        onnxruntime.InferenceSession(str(plain), options, providers=["CPUExecutionProvider"])
        quantize_dynamic(
            folded,
            small,
            per_channel=True,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gemm"],
        )
        made = onnx.load_model(small)
    finally:
        for file in (plain, folded, small):
            file.unlink(missing_ok=True)
    used = {node.domain for node in made.graph.node}
    kept = [opset for opset in made.opset_import if opset.domain in used]
    del made.opset_import[:]
    made.opset_import.extend(kept)
    return made


def _write_torch(graph: Graph, path: Path, info: ExportInfo) -> None:
    program = torch.export.export(
        graph, (graph.example(),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    torch.export.save(program, path, extra_files={METADATA: info.as_json()})


def _check_logits(graph: Graph, path: Path, info: ExportInfo) -> None:
    """Another batch than the exporter saw must give the logits that torch gives."""
    images = graph.example(3)
    with torch.inference_mode():
        difference = float((open_export(path)(images) - graph(images)[0]).abs().max())
    allowed = TOLERANCES[info.precision]
    if not difference <= allowed:
        raise CheckpointError(
            f"the {info.format} file gives logits that differ by {difference:.1e} from the "
            f"student's, more than {allowed:g}; export with another opset or format"
        )


def _onnxruntime_session(path: Path) -> Any:
    _need("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@dataclass(frozen=True, slots=True)
class Comparison:
    """An exported file beside its student, on pictures.

    Attributes:
        num_images: pictures.
        max_difference: largest difference of a logit.
        agreement: share of pictures with the same best class, in percent.
        accuracy, student_accuracy: top-1 in percent; None without labels.
    """

    num_images: int
    max_difference: float
    agreement: float
    accuracy: float | None
    student_accuracy: float | None


def compare(path: str | os.PathLike[str], student: Student, pictures: Any) -> Comparison:
    """Run an exported file and its student on the same pictures.

    Args:
        path: the file.
        student: the student it was exported from.
        pictures: labelled ones in any form that `Student.evaluate` takes, or a folder or list of
            unlabelled ones.

    Raises:
        CheckpointError: a file of another student.
        DataError: no pictures.
    """
    info, run = verify_export(path, student), open_export(path)
    paths, labels = _pictures(student, pictures)
    ours, theirs = [], []
    for start in range(0, len(paths), _BATCH):
        part = list(paths[start : start + _BATCH])
        ours.append(student.logits(part).cpu())
        theirs.append(run(feed_of(student, info, part)))
    mine, other = torch.cat(ours), torch.cat(theirs)
    best = [t.argmax(dim=-1) for t in (mine, other)]
    right = [None if labels is None else 100 * float((b == labels).double().mean()) for b in best]
    return Comparison(
        num_images=len(paths),
        max_difference=float((mine - other).abs().max()),
        agreement=100 * float((best[0] == best[1]).double().mean()),
        accuracy=right[1],
        student_accuracy=right[0],
    )


def _pictures(student: Student, pictures: Any) -> tuple[tuple[Picture, ...], Tensor | None]:
    from promptkd.data.sources import labelled, pictures_in

    try:
        found = labelled(pictures, student.class_names, part="test")
    except DataError:
        if isinstance(pictures, str | os.PathLike) and Path(pictures).is_dir():
            return pictures_in(Path(pictures)).paths, None
        raise
    assert found.labels is not None
    return found.paths, torch.from_numpy(found.labels)
