"""Both stages against numbers that the official PromptKD code gave for the same inputs.

Float64: every key of every file to 1e-9 of its largest value. Float32: forwards, the first step's
losses, gradients and the learning rates; what follows is chaotic there (a rounding flips a ReLU).
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from golden_set import GoldenSet
from promptkd.class_names import plain_name
from promptkd.class_vectors import ensemble_features, prompted_class_vectors, unit
from promptkd.clip import PRECISIONS, Clip, load_clip
from promptkd.prompts import DeepPrompts, PromptedNames
from promptkd.stages.distill import DistillConfig, DistillStep, new_student
from promptkd.stages.progress import Progress
from promptkd.stages.run import Run, Training
from promptkd.stages.teach import (
    PromptAverage,
    PromptSRC,
    TeachConfig,
    finish_teacher,
    gpa_weights,
)
from promptkd.stages.views import Batch
from promptkd.student import Student
from promptkd.teacher import Teacher, TeacherInfo
from safetensors.torch import save_file
from torch import Tensor

TEMPLATE = "a photo of a {}."
# Relative to the largest value of a key: (float64, float32); None: not comparable in float32.
TOLERANCES: dict[str, tuple[float, float | None]] = {
    "forward": (1e-9, 4e-6),  # 2e-6 on one machine; other processors add up in another order
    "grad0": (1e-9, 2e-5),
    "later": (1e-9, None),
}
# The gradient of a bias before BatchNorm is zero but for rounding.
ZERO_GRADIENT = "VPT_image_trans.conv1.0.bias"


def compare(golden: GoldenSet, precision: str, file: str, ours: dict[str, Any]) -> None:
    """Compare every key of a golden file; a key that we don't produce is a failure."""
    expected = golden.expected(precision, file)
    missing = sorted(set(expected) - set(ours))
    assert not missing, f"{file}: nothing compared {missing}"
    for key, want in expected.items():
        have = ours[key]
        have = have.detach().cpu().numpy() if isinstance(have, Tensor) else np.asarray(have)
        assert have.shape == want.shape, f"{file}/{key}: shape {have.shape}, expected {want.shape}"
        if want.dtype.kind in "USi":
            np.testing.assert_array_equal(have, want, err_msg=f"{file}/{key}")
            continue
        kind = _kind(key, have)
        tolerance = TOLERANCES[kind][0 if precision == "fp64" else 1]
        if tolerance is None:
            assert np.isfinite(have).all(), f"{file}/{key}"
            continue
        scale = max(float(np.abs(want).max()), 1e-30)
        floor = {"fp64": 1e-10, "fp32": 1e-3}[precision] if key.endswith(ZERO_GRADIENT) else 0.0
        worst = float(np.abs(have - want).max())
        assert worst <= tolerance * scale + floor, (
            f"{file}/{key}: off by {worst / scale:.2e} of its max"
        )


def _kind(key: str, value: Any) -> str:
    if key.startswith("grad0/"):
        return "grad0"
    if key.startswith(("after1/", "raw_epoch", "epoch", "final_", "traj/")) and key != "traj/lr":
        return "later"
    return "forward"


def _clip(golden: GoldenSet, group: str, precision: str, folder: Path) -> Clip:
    """The set's model through the real loader: a state dict in OpenAI's layout on disk."""
    path = folder / f"{group}.pt"
    if not path.exists():
        torch.save(golden.tensors(group, torch.float16), path)
    return load_clip(path, precision=precision)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("golden")


def _vision(tensors: dict[str, Tensor]) -> DeepPrompts:
    keys = [k for k in tensors if k.startswith("image_encoder.")]
    return DeepPrompts([tensors[k] for k in sorted(keys, key=_layer)])


def _text(tensors: dict[str, Tensor]) -> DeepPrompts:
    keys = [k for k in tensors if k.startswith(("prompt_learner.", "text_encoder."))]
    return DeepPrompts([tensors[k] for k in sorted(keys, key=_layer)])


def _layer(key: str) -> int:
    return int(key.split(".resblocks.")[1].split(".")[0]) if ".resblocks." in key else 0


def _named_prompts(vision: DeepPrompts, text: DeepPrompts | None = None) -> dict[str, Tensor]:
    """Our prompts under the official code's names."""
    named = {"image_encoder.VPT": vision.layers[0]}
    for layer in range(1, vision.depth):
        named[f"image_encoder.transformer.resblocks.{layer}.VPT_shallow"] = vision.layers[layer]
    if text is not None:
        named["prompt_learner.ctx"] = text.layers[0]
        for layer in range(1, text.depth):
            named[f"text_encoder.transformer.resblocks.{layer}.VPT_shallow"] = text.layers[layer]
    return named


PROJECTOR_NAMES = {
    "0.weight": "linear1.weight",
    "0.bias": "linear1.bias",
    "1.weight": "norm.weight",
    "1.bias": "norm.bias",
    "3.weight": "linear2.weight",
    "3.bias": "linear2.bias",
}


def _named_projector(student: Student) -> dict[str, Tensor]:
    own = dict(student.projector.named_parameters())
    named = {}
    for theirs, ours in PROJECTOR_NAMES.items():
        tensor = own[ours]
        named[f"VPT_image_trans.conv1.{theirs}"] = tensor
    return named


def _like_conv(key: str, tensor: Tensor) -> Tensor:
    """The official projector's weights are 1x1 convolutions."""
    is_conv = key.startswith("VPT_image_trans") and key.endswith(("0.weight", "3.weight"))
    return tensor[:, :, None, None] if is_conv else tensor


def _snapshot(prefix: str, named: dict[str, Tensor], grad: bool = False) -> dict[str, Tensor]:
    return {
        f"{prefix}/{k}": _like_conv(k, (v.grad if grad else v).detach().clone())  # type: ignore[union-attr]
        for k, v in named.items()
    }


def _tokens(clip: Clip, names: list[str]) -> Tensor:
    return clip.tokenize([TEMPLATE.format(plain_name(n)) for n in names])


def _logits(clip: Clip, image: Tensor, text: Tensor) -> Tensor:
    return clip.logit_scale * unit(image) @ unit(text).T


@torch.no_grad()
def test_zero_shot(golden: GoldenSet, precision: str, folder: Path) -> None:
    ours: dict[str, Any] = {}
    images = golden.tensors("data", PRECISIONS[precision])["test_images"]
    for side in ("teacher", "student"):
        clip = _clip(golden, side, precision, folder)
        tokens = _tokens(clip, golden.config["classnames"])
        ours["tokens"] = tokens
        image, text = clip.vision(images), clip.need_text("test")(tokens)
        ours |= {f"{side}_image": image, f"{side}_text": text}
        ours[f"{side}_logits"] = _logits(clip, image, text)
    compare(golden, precision, "a_zeroshot", ours)


@torch.no_grad()
def test_prompted(golden: GoldenSet, precision: str, folder: Path) -> None:
    ours: dict[str, Any] = {}
    dtype = PRECISIONS[precision]
    images = golden.tensors("data", dtype)["test_images"]
    for side in ("teacher", "student"):
        clip = _clip(golden, side, precision, folder)
        tensors = golden.tensors(f"{side}_prompts", dtype)
        if side == "student":
            tensors |= golden.tensors("student_text_prompts", dtype)
        vision, text = _vision(tensors), _text(tensors)
        tower = clip.need_text("test")
        names = PromptedNames(golden.config["classnames"], TEMPLATE, 4, clip.tokenize)
        ours["tokens"] = names.tokens
        ours[f"{side}_ctx_init"] = tower.token_embedding(names.context)
        image, words = clip.vision(images, vision()), tower(names.tokens, text())
        ours |= {f"{side}_image_raw": image, f"{side}_text_raw": words}
        ours |= {f"{side}_image": unit(image), f"{side}_text": unit(words)}
        ours[f"{side}_logits"] = _logits(clip, image, words)
        cut = prompted_class_vectors(clip, golden.config["classnames"], TEMPLATE, text)
        torch.testing.assert_close(
            cut, unit(words), rtol=0, atol=1e-12 if precision == "fp64" else 2e-6
        )
    compare(golden, precision, "b_prompted", ours)


class TensorBatches:
    """A golden set's batches: fixed rows of ready pixels, with what belongs to them."""

    def __init__(self, order: Any, epochs: int, *columns: Tensor, wrap: Any = tuple) -> None:
        self.order, self.columns, self.wrap = torch.from_numpy(order), columns, wrap
        self.steps_per_epoch = len(order) // epochs

    def batches(self, epoch: int, first: int) -> Iterator[Any]:
        start = epoch * self.steps_per_epoch
        for rows in self.order[start + first : start + self.steps_per_epoch]:
            yield self.wrap(column[rows] for column in self.columns)


class Recorder:
    """Collects losses, learning rates and gradient norms as the official harness did."""

    def __init__(
        self, named: dict[str, Tensor], trainable: list[str], training: Training[Any]
    ) -> None:
        self.named, self.trainable, self.training = named, trainable, training
        self.losses: dict[str, list[float]] = {}
        self.rates: list[float] = []
        self.norms: list[list[float]] = []
        self.first: dict[str, Tensor] = {}

    def on_gradients(self, step: int, losses: dict[str, Tensor]) -> None:
        for name, value in losses.items():
            self.losses.setdefault(name, []).append(float(value.detach()))
        config, batches = self.training.config, self.training.batches
        total = config.num_steps(batches.steps_per_epoch)
        self.rates.append(config.learning_rate(step, batches.steps_per_epoch, total))
        gradients = [self.named[name].grad for name in self.trainable]
        assert all(g is not None for g in gradients)
        self.norms.append([float(g.norm()) for g in gradients if g is not None])
        if step == 0:
            self.first = _snapshot("grad0", self.named, grad=True)

    def trajectory(self) -> dict[str, Any]:
        return {f"traj/{k}": v for k, v in self.losses.items()} | {
            "traj/lr": self.rates,
            "traj/gradnorm": self.norms,
        }


def _count_tensors(vision_layers: int) -> int:
    """Tensors of an image encoder: 12 a block, and embeddings, norms, convolution, projection."""
    return 12 * vision_layers + 8


def test_stage1(golden: GoldenSet, precision: str, folder: Path) -> None:
    dtype, settings = PRECISIONS[precision], golden.config["src"]
    clip = _clip(golden, "teacher", precision, folder)
    frozen_before = {k: v.clone() for k, v in clip.vision.state_dict().items()}
    names = golden.config["classnames"]
    base = names[: math.ceil(len(names) / 2)]
    config = TeachConfig.paper(
        epochs=settings["epochs"],
        batch_size=settings["batch"],
        lr=settings["lr"],
        prompt_depth=settings["depth"],
        gpa_mean=settings["gpa_mean"],
        gpa_std=settings["gpa_std"],
        precision=precision,
    )
    model = PromptSRC(clip, base, config)
    initial = golden.tensors("src_init", dtype)
    named = _named_prompts(model.vision_prompts, model.text_prompts)
    with torch.no_grad():
        for key, value in initial.items():
            named[key].copy_(value)
    data = golden.tensors("data", dtype)
    labels = torch.from_numpy(golden.inputs["data"]["train_labels"])
    weights = gpa_weights(config.gpa_mean, config.gpa_std, config.epochs)
    average = PromptAverage(model.prompts(), weights)
    expected = golden.expected(precision, "c_promptsrc")
    trainable = [str(name) for name in expected["trainable"]]
    assert sorted(trainable) == sorted(named)
    ours: dict[str, Any] = {"trainable": trainable, "gpa_weights": weights}
    # The official optimiser is handed every parameter, frozen ones and the zero-shot encoder too.
    vision, text = golden.config["teacher"]["v_layers"], golden.config["teacher"]["t_layers"]
    ours["optimizer_param_count"] = len(named) + 2 * _count_tensors(vision) + 12 * text + 4 + 1
    ours["fixed_embeddings"] = ensemble_features(clip, base, config.templates)
    batches = TensorBatches(
        golden.inputs["data"]["order_src"], config.epochs, data["train_images"], labels
    )
    first = batches.columns[0][batches.order[0]]
    with torch.no_grad():
        words = unit(clip.need_text("test")(model.tokens, model.text_prompts()))
        ours["step0_logits"] = (
            clip.logit_scale * unit(clip.vision(first, model.vision_prompts())) @ words.T
        )

    def on_step(done: int) -> None:
        if done == 1:
            ours.update(_snapshot("after1", named))

    def on_epoch(epoch: int) -> None:
        ours.update(_snapshot(f"raw_epoch{epoch}", named))
        average.add(epoch)

    training = Training(
        config=config,
        parameters=model.prompts(),
        modules={},
        batches=batches,
        step=lambda batch: model.losses(*batch),
        run=Run(None, "teach", {}, resume=False),
        progress=Progress(quiet=True),
        on_step=on_step,
        on_epoch=on_epoch,
    )
    recorder = Recorder(named, trainable, training)
    training.on_gradients = recorder.on_gradients
    training.execute()
    average.install()
    ours |= recorder.first | recorder.trajectory() | _snapshot("final_gpa", named)
    teacher = finish_teacher(model, names, {})
    logits = clip.logit_scale * teacher.encode_image(data["test_images"]) @ teacher.class_vectors.T
    ours["final_eval_logits_base"] = logits[:, : len(base)]
    ours["final_eval_logits_novel"] = logits[:, len(base) :]
    # The official average rounds the frozen weights; ours leaves them alone.
    after = clip.vision.state_dict()
    assert all(torch.equal(after[k], v) for k, v in frozen_before.items())
    ours["gpa_frozen_weight_perturbation"] = expected["gpa_frozen_weight_perturbation"]
    assert float(expected["gpa_frozen_weight_perturbation"]) >= 0.0
    compare(golden, precision, "c_promptsrc", ours)


def _teacher(golden: GoldenSet, precision: str, folder: Path) -> Teacher:
    """The set's fixed, already tuned teacher with class vectors of all names."""
    clip = _clip(golden, "teacher", precision, folder)
    tensors = golden.tensors("teacher_prompts", PRECISIONS[precision])
    names, text = golden.config["classnames"], _text(tensors)
    vectors = prompted_class_vectors(clip, names, TEMPLATE, text)
    info = TeacherInfo("promptsrc", TEMPLATE, (), tuple(names), {})
    return Teacher(clip, info, vectors, _vision(tensors), text)


def _student(golden: GoldenSet, teacher: Teacher, config: DistillConfig, folder: Path) -> Student:
    clip = _clip(golden, "student", config.precision, folder)
    student = new_student(clip, teacher, config)
    dtype = PRECISIONS[config.precision]
    prompts = golden.tensors("student_prompts", dtype)
    named = _named_prompts(student.prompts)
    projector = golden.tensors("projector", dtype)
    with torch.no_grad():
        for key, tensor in named.items():
            tensor.copy_(prompts[key])
        for key, tensor in _named_projector(student).items():
            tensor.copy_(projector[key].reshape(tensor.shape))
    return student


def _official_shapes(golden: GoldenSet, student: Student) -> list[str]:
    """Names, shapes and flags of the official student, from our own parts."""
    raw = golden.inputs["student"]
    frozen = {k: v.shape for k, v in raw.items() if k.startswith("visual.") or k == "logit_scale"}
    lines = [
        f"{k.replace('visual.', 'image_encoder.')} {tuple(s)} False" for k, s in frozen.items()
    ]
    trained = _named_prompts(student.prompts) | _named_projector(student)
    return lines + [f"{k} {tuple(_like_conv(k, v).shape)} True" for k, v in trained.items()]


def test_stage2(golden: GoldenSet, precision: str, folder: Path) -> None:
    for name in golden.config["kd"]:
        _check_stage2(golden, precision, folder, name)


def _check_stage2(golden: GoldenSet, precision: str, folder: Path, name: str) -> None:
    dtype, settings = PRECISIONS[precision], golden.config["kd"][name]
    names = golden.config["classnames"]
    half = math.ceil(len(names) / 2)
    config = DistillConfig.paper(
        "dtd",
        epochs=settings["epochs"],
        batch_size=settings["batch"],
        lr=settings["lr"],
        temperature=settings["T"],
        kd_weight=settings["kd"] / len(names),
        prompt_depth=settings["depth"],
        precision=precision,
    )
    teacher = _teacher(golden, precision, folder)
    student = _student(golden, teacher, config, folder)
    trained = _named_prompts(student.prompts) | _named_projector(student)
    expected = golden.expected(precision, f"d_{name}")
    trainable = [str(n) for n in expected["trainable"]]
    assert sorted(trainable) == sorted(trained)
    assert len(student.trainable_parameters()) == len(trainable)
    shapes = _official_shapes(golden, student)
    assert sorted(shapes) == sorted(str(s) for s in expected["all_student_params_shapes"])
    ours: dict[str, Any] = {
        "trainable": trainable,
        "optimizer_param_count": len(shapes),
        "all_student_params_shapes": expected["all_student_params_shapes"],
    }
    data = golden.tensors("data", dtype)
    features = teacher.encode_image(data["train_images"])
    order = golden.inputs["data"][f"order_{name}"]
    batches = TensorBatches(
        order, config.epochs, data["train_images"], features, wrap=lambda columns: Batch(*columns)
    )
    step = DistillStep(student, teacher.logit_scale, config)
    ours |= _first_step(student, teacher, data["train_images"][order[0]], settings["T"])
    norm = student.projector.norm
    norm.reset_running_stats()  # the look at the first step moved them
    running_norms: list[float] = []

    def buffers(prefix: str) -> dict[str, Tensor]:
        return {f"{prefix}/VPT_image_trans.conv1.1.{k}": v.clone() for k, v in norm.named_buffers()}

    def on_step(done: int) -> None:
        assert norm.running_mean is not None
        running_norms.append(float(norm.running_mean.norm()))
        if done == 1:
            ours.update(_snapshot("after1", trained) | buffers("after1"))

    def on_epoch(epoch: int) -> None:
        ours.update(_snapshot(f"epoch{epoch}", trained) | buffers(f"epoch{epoch}"))

    training = Training(
        config=config,
        parameters=student.trainable_parameters(),
        modules={},
        batches=batches,
        step=step,
        run=Run(None, "distill", {}, resume=False),
        progress=Progress(quiet=True),
        on_step=on_step,
        on_epoch=on_epoch,
    )
    recorder = Recorder(trained, trainable, training)
    training.on_gradients = recorder.on_gradients
    student.train()
    training.execute()
    student.eval()
    recorder.losses.pop("kl")
    ours |= recorder.first | recorder.trajectory() | {"traj/bn_running_mean_norm": running_norms}
    logits = student.logits(data["test_images"])
    if settings["modal"] == "cross":
        ours["final_eval_logits_all"] = logits
    else:
        ours["final_eval_logits_base"], ours["final_eval_logits_novel"] = (
            logits[:, :half],
            logits[:, half:],
        )
    ours["final_eval_student_image"] = student.encode_image(data["test_images"])
    test_features = teacher.encode_image(data["test_images"])
    ours["final_eval_teacher_logits_all"] = (
        teacher.logit_scale * test_features @ teacher.class_vectors.T
    )
    compare(golden, precision, f"d_{name}", ours)


@torch.no_grad()
def _first_step(
    student: Student, teacher: Teacher, pixels: Tensor, temperature: float
) -> dict[str, Tensor]:
    student.train()
    projected = unit(student.project(pixels))
    student_logits = student.logit_scale * projected @ teacher.class_vectors.T
    features = teacher.encode_image(pixels)
    teacher_logits = teacher.logit_scale * features @ teacher.class_vectors.T
    kl = torch.nn.functional.kl_div(
        (student_logits / temperature).log_softmax(1),
        (teacher_logits / temperature).softmax(1),
        reduction="sum",
    )
    return {
        "step0_kl_sum": kl,
        "step0_tea_image": features,
        "step0_tea_text": teacher.class_vectors,
        "step0_tea_logits": teacher_logits,
        "step0_stu_image": projected,
        "step0_stu_logits": student_logits,
    }


def test_inputs_are_the_recipe(golden: GoldenSet) -> None:
    """Where a set comes with its inputs, the recipe gives the same bits."""
    from safetensors.torch import load_file

    files = {"teacher", "student"}
    found = [name for name in files if (golden.folder / f"{name}.safetensors").is_file()]
    for name in found:
        stored = load_file(golden.folder / f"{name}.safetensors")
        ours = golden.tensors(name, torch.float32)
        assert stored.keys() == ours.keys()
        # A file may hold a number as one of shape (1,).
        assert all(torch.equal(stored[k].float().view_as(v), v) for k, v in ours.items())
    digest = {"seed", "image", "classnames", "teacher", "student", "src", "kd"}
    assert digest <= set(golden.config)


@torch.no_grad()
def test_our_towers_equal_the_library(golden: GoldenSet, folder: Path) -> None:
    """Without prompts, our private towers are open_clip's own: 1e-9 in float64, 1e-5 in float32."""
    path = folder / "teacher.safetensors"
    save_file(golden.tensors("teacher", torch.float32), path)
    images = golden.tensors("data", torch.float64)["test_images"]
    for precision, tolerance in (("fp64", 1e-9), ("fp32", 1e-5)):
        dtype = PRECISIONS[precision]
        clip = load_clip(path, precision=precision)
        library = open_clip.CLIP(**clip.model_cfg).to(dtype).eval()
        library.load_state_dict(golden.tensors("teacher", dtype))
        tokens = _tokens(clip, golden.config["classnames"])
        pairs = [
            (clip.vision(images), library.encode_image(images.to(dtype))),
            (clip.need_text("test")(tokens), library.encode_text(tokens)),
        ]
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
