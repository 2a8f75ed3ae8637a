"""Official checkpoints: what Dassl itself saved is read; what a pickle could run never runs."""

import builtins
import importlib
import os
import pickle
import random
import re
import shutil
import subprocess
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from promptkd import official
from promptkd.errors import CheckpointError
from torch import nn

FIXTURES = Path(__file__).resolve().parent / "official"
FILES = sorted(FIXTURES.glob("*/model*"))
IDS = [path.parent.name for path in FILES]


def trusted(path: Path) -> Any:
    """torch's own, unrestricted reading of a file of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old schedulers warn when they are restored
        return torch.load(path, weights_only=False)


def test_there_are_fixtures_of_both_methods_and_depths() -> None:
    kinds = {name.partition("-")[2] for name in IDS}
    assert kinds == {"teacher-d9", "teacher-d3", "student-d9", "student-d3"}


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_reads_what_dassl_saved(path: Path) -> None:
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)  # a live scheduler: what this reader is for
    content = trusted(path)
    kind, depth = path.parent.name.split("-")[1], int(path.parent.name[-1])
    got = official.load(path)
    assert (got.kind, got.vision_depth) == (kind, depth)
    assert got.text_depth == (depth if kind == "teacher" else 0)
    assert got.num_classes == (3 if kind == "teacher" else None)
    assert (got.epoch, got.val_result) == (content["epoch"], content["val_result"])
    assert got.dtype == torch.float16
    state = content["state_dict"]
    assert got.logit_scale == state["logit_scale"].item()
    towers = [("image_encoder.VPT", "image_encoder", got.vision_prompts)]
    if kind == "teacher":
        towers.append(("prompt_learner.ctx", "text_encoder", got.text_prompts))
    for first, tower, prompts in towers:
        names = [f"{tower}.transformer.resblocks.{i}.VPT_shallow" for i in range(1, depth)]
        for name, prompt in zip([first, *names], prompts, strict=True):
            torch.testing.assert_close(prompt, state[name].float(), rtol=0, atol=0)
    assert bool(got.projector) == (kind == "student")


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_every_tensor_is_as_stored(path: Path) -> None:
    got = official.read_checkpoint(path)
    want = trusted(path)["state_dict"]
    assert list(got.state_dict) == list(want)
    for name, tensor in want.items():
        assert got.state_dict[name].dtype == tensor.dtype
        assert torch.equal(got.state_dict[name], tensor), name
    assert "torch.optim.lr_scheduler.CosineAnnealingLR" in got.placeholders
    assert "torch.optim.sgd.SGD" in got.placeholders
    for name in ("VPT", "ctx"):
        only = official.read_checkpoint(path, only=re.compile(name))
        assert set(only.state_dict) == {k for k in want if name in k}


def test_the_projector_computes_what_the_official_one_computes() -> None:
    path = FIXTURES / "torch2.15-student-d9" / "model-best.pth.tar"
    got = official.load(path)
    state = trusted(path)["state_dict"]
    wide, narrow = got.projector["linear1.weight"].shape
    conv = nn.Sequential(
        nn.Conv2d(narrow, wide, 1), nn.BatchNorm2d(wide), nn.ReLU(), nn.Conv2d(wide, wide, 1)
    )
    prefix = "VPT_image_trans.conv1."
    conv.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if prefix in k})
    from promptkd.student import Projector

    projector = Projector(narrow, wide)
    projector.load_state_dict(dict(got.projector))
    features = torch.randn(6, narrow)
    with torch.no_grad():
        want = conv.float().eval()(features[:, :, None, None])[:, :, 0, 0]
        torch.testing.assert_close(projector.eval()(features), want)
    assert got.projector["norm.num_batches_tracked"].dtype == torch.int64


# ---------------------------------------------------------------- files made for a test
def save(tmp_path: Path, state: dict[str, Any], **more: Any) -> Path:
    path = tmp_path / "model.pth.tar-20"
    torch.save({"state_dict": OrderedDict(state), "epoch": 20, "val_result": None, **more}, path)
    return path


def teacher_state(depth: int = 3) -> dict[str, Any]:
    state = {"image_encoder.VPT": torch.zeros(4, 8), "prompt_learner.ctx": torch.zeros(4, 6)}
    for i in range(1, depth):
        for tower, width in (("image_encoder", 8), ("text_encoder", 6)):
            state[f"{tower}.transformer.resblocks.{i}.VPT_shallow"] = torch.zeros(4, width)
    return state


def student_state() -> dict[str, Any]:
    path = FIXTURES / "torch2.15-student-d3" / "model.pth.tar-20"
    return dict(official.read_checkpoint(path).state_dict)


def test_prefix_parameters_views_and_types(tmp_path: Path) -> None:
    """ "module." of DataParallel, live parameters, views, shared storages, every dtype."""
    base = torch.arange(48.0).reshape(6, 8)
    state = {f"module.{k}": v for k, v in teacher_state().items()}
    state["module.image_encoder.VPT"] = nn.Parameter(base[1:5])
    state["transposed"] = base.T
    state["empty"] = torch.zeros(0, 3)
    kinds = (torch.float64, torch.bfloat16, torch.int32, torch.uint8, torch.bool)
    state.update({str(d): base.to(d) for d in kinds})
    path = save(tmp_path, state, scheduler={"args": torch.device("cpu"), "dtype": torch.float16})
    assert torch.equal(official.load(path).vision_prompts[0], base[1:5])
    got = official.read_checkpoint(path).state_dict
    for key, value in state.items():
        assert torch.equal(got[key.removeprefix("module.")], value)
        assert got[key.removeprefix("module.")].dtype == value.dtype


class Marker:
    """Pickles as a call, or as an object of this class whose state would be restored."""

    def __init__(self, call: Callable[..., Any], *args: Any) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> Any:
        return self.call, self.args


class Restored:
    """A class that no checkpoint needs, with code that runs when it is unpickled."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __setstate__(self, state: dict[str, Any]) -> None:
        Path(state["marker"]).touch()


def attacks(marker: Path) -> list[tuple[str, Marker]]:
    """Calls that would create `marker`, by the name that the pickle gives them."""
    code = f"open({str(marker)!r}, 'w').close()"
    return [
        (f"{os.name}.system", Marker(os.system, f"touch '{marker}'")),
        ("builtins.eval", Marker(eval, code)),
        ("builtins.exec", Marker(exec, code)),
        ("io.open", Marker(open, str(marker), "w")),
        ("subprocess.Popen", Marker(subprocess.Popen, ["touch", str(marker)])),
        ("subprocess.check_output", Marker(subprocess.check_output, ["touch", str(marker)])),
        (f"{os.name}.mkdir", Marker(os.mkdir, str(marker))),
        ("builtins.getattr", Marker(builtins.getattr, Marker(importlib.import_module, "os"), "x")),
        ("importlib.import_module", Marker(importlib.import_module, "this_module_is_not_there")),
        ("shutil.copy", Marker(shutil.copy, __file__, str(marker))),
        ("pickle.loads", Marker(pickle.loads, pickle.dumps(Marker(os.mkdir, str(marker))))),
        ("torch.serialization.save", Marker(torch.save, 1, str(marker))),
        ("torch.hub.load", Marker(torch.hub.load, str(marker), "x")),
    ]


@pytest.mark.parametrize("index", range(13))
@pytest.mark.parametrize("place", ["state_dict", "value", "scheduler", "key"])
def test_calls_are_refused_and_never_made(index: int, place: str, tmp_path: Path) -> None:
    marker = tmp_path / "was here"
    names = attacks(marker)
    assert len(names) == 13
    name, attack = names[index]
    content: dict[Any, Any] = {"state_dict": teacher_state(), "epoch": 1}
    if place == "value":
        content["state_dict"]["image_encoder.VPT"] = attack
    elif place == "key":
        content[attack] = 1
    else:
        content[place] = attack
    path = tmp_path / "model-best.pth.tar"
    torch.save(content, path)
    with pytest.raises(CheckpointError) as raised:
        official.load(path)
    assert not marker.exists()
    inner = {"builtins.getattr"}  # either of the two calls may be met first
    assert name in str(raised.value) or name in inner
    assert "is refused: its pickle calls" in str(raised.value)


def test_the_attacks_are_real(tmp_path: Path) -> None:
    """Without the restricted unpickler the marker is made: the test above can fail."""
    marker = tmp_path / "was here"
    path = tmp_path / "model-best.pth.tar"
    torch.save({"state_dict": {}, "scheduler": Marker(os.mkdir, str(marker))}, path)
    trusted(path)
    assert marker.exists()


@pytest.mark.parametrize("place", ["scheduler", "optimizer", "extra"])
def test_other_classes_become_inert_placeholders(place: str, tmp_path: Path) -> None:
    marker = tmp_path / "was here"
    path = save(tmp_path, teacher_state(), **{place: {"live": [Restored(str(marker))]}})
    got = official.load(path)
    assert not marker.exists()
    assert got.vision_depth == 3
    assert f"{__name__}.Restored" in official.read_checkpoint(path).placeholders
    trusted(path)
    assert marker.exists()  # the class does run code when it is really restored


def archive(tmp_path: Path, pickled: bytes, **entries: bytes) -> Path:
    """A torch.save file with a pickle of our own making."""
    path = tmp_path / "made.pth.tar"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("made/data.pkl", pickled)
        for name, data in entries.items():
            file.writestr(f"made/data/{name}", data)
    return path


def global_(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


STORAGE = b"(V" + b"storage\n" + global_("torch.FloatStorage") + b"V0\nVcpu\nI%d\ntQ"


def tensor(numel: int, offset: int, shape: bytes, stride: bytes) -> bytes:
    """Pickle of {"state_dict": {"t": tensor}}, the tensor described as given."""
    rebuild = global_("torch._utils._rebuild_tensor_v2") + b"(" + STORAGE % numel
    rebuild += b"I%d\n(" % offset + shape + b"t(" + stride + b"t" + b"I00\nNtR"
    return b"(dVstate_dict\n(dVt\n" + rebuild + b"ss."


def test_a_made_up_archive_is_read(tmp_path: Path) -> None:
    """The pickles of the next tests are refused for what they say, not for their form."""
    data = torch.arange(4.0).numpy().tobytes()
    path = archive(tmp_path, tensor(4, 1, b"I3\n", b"I1\n"), **{"0": data})
    assert official.read_checkpoint(path).state_dict["t"].tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("pickled", "said"),
    [
        (tensor(4, 2, b"I3\n", b"I1\n"), "beyond its storage"),
        (tensor(4, 0, b"I99999999999\n", b"I0\n"), "beyond its storage"),
        (tensor(4, 0, b"I2\n", b"I4\n"), "beyond its storage"),
        (tensor(4, -1, b"I2\n", b"I1\n"), "describes a tensor wrongly"),
        (tensor(4, 3, b"I2\n", b"I-1\n"), "describes a tensor wrongly"),
        (tensor(4, 0, b"I2\nI2\n", b"I1\n"), "describes a tensor wrongly"),
        (tensor(400, 0, b"I3\n", b"I1\n"), "has 16 of 1600 bytes"),
        (tensor(2, 0, b"I2\n", b"I1\n"), "larger than it may be"),
        (b"(dVstate_dict\n(dVt\nI1\nss.", "state_dict['t'] is no tensor"),
        (b"(dVstate_dict\n(dI1\nI1\nss.", "state_dict[1] is no tensor"),
        (b"(dVepoch\nI1\ns.", "no 'state_dict'"),
        (b"(lI1\na.", "no 'state_dict'"),
        (b"(dVstate_dict\nVx\nQs.", "no tensor storage"),
        # A state for one of our own functions: it would stay changed for later files.
        (global_("torch._utils._rebuild_parameter") + b"(dVx\nI1\nsb.", "may not change"),
        (global_("torch.FloatStorage") + b"(dVdtype\nI1\nsb.", "may not change"),
        (global_("posix.system") + b"(Vtrue\ntR.", "calls 'posix.system'"),
        (b"(Vtrue\n" + b"i" + global_("posix.system")[1:] + b".", "calls 'posix.system'"),
        (global_("__builtin__.eval") + b"(V1\ntR.", "calls 'builtins.eval'"),
        (b"\x80\x04\x8c\x02nt\x8c\x06system\x93.", "calls 'nt.system'"),
        (b"\x80\x04\x8c\x08builtins\x8c\x0ftype.__init__.x\x93.", "calls 'builtins.type"),
        (global_("torch.load") + b"(Vx\ntR.", "calls 'torch.load'"),
        (global_("webbrowser.Chrome") + b"(Vx\ntR.", "calls 'webbrowser.Chrome'"),
        (b"\x80\x02", "damaged pickle"),
        (b"", "damaged pickle"),
        (b"0.", "damaged pickle"),
        (b"\x82\x01.", "damaged pickle"),
    ],
)
def test_odd_pickles(pickled: bytes, said: str, tmp_path: Path) -> None:
    path = archive(tmp_path, pickled, **{"0": b"\0" * 16})
    with pytest.raises(CheckpointError) as raised:
        official.read_checkpoint(path)
    assert said in str(raised.value)
    assert str(path) in str(raised.value)


def overwrite(data: bytes, rng: random.Random, start: int = 0) -> bytes:
    damaged = bytearray(data)
    for _ in range(rng.choice([1, 1, 3])):
        damaged[rng.randrange(start, len(damaged))] = rng.randrange(256)
    return bytes(damaged)


@pytest.mark.parametrize("part", ["pickle", "archive", "end"])
def test_damaged_bytes_never_end_in_another_error(part: str, tmp_path: Path) -> None:
    """Hundreds of damaged files are read or refused, and run nothing."""
    source = FIXTURES / "torch2.15-teacher-d3" / "model.pth.tar-20"
    whole = source.read_bytes()
    with zipfile.ZipFile(source) as file:
        entries = {n: file.read(n) for n in file.namelist()}
    name = next(n for n in entries if n.endswith("data.pkl"))
    rng = random.Random(7)
    refused = 0
    for _ in range(150):
        path = tmp_path / "damaged"
        if part == "pickle":
            with zipfile.ZipFile(path, "w") as file:
                for entry, data in (entries | {name: overwrite(entries[name], rng)}).items():
                    file.writestr(entry, data)
        else:  # the zip's directory is at the end
            path.write_bytes(overwrite(whole, rng, 0 if part == "archive" else len(whole) - 6000))
        try:
            official.read_checkpoint(path)
        except CheckpointError:
            refused += 1
    assert 15 < refused < 150


def packed(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("made/data.pkl", b"N" * 4096 + b".")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: None, "no such file"),
        (lambda p: p.mkdir(), "is a directory"),
        (lambda p: p.write_bytes(b""), "no checkpoint of torch 1.6 or later"),
        (lambda p: p.write_bytes(pickle.dumps(Marker(os.mkdir, f"{p}.ran"))), "not opened as"),
        (lambda p: p.write_bytes(FILES[0].read_bytes()[:9000]), "cut short"),
        (lambda p: zipfile.ZipFile(p, "w").close(), "no checkpoint of torch.save"),
        (packed, "is packed"),
    ],
)
def test_other_files(make: Callable[[Path], Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "model-best.pth.tar"
    make(path)
    with pytest.raises(CheckpointError) as raised:
        official.load(path)
    assert said in str(raised.value)
    assert not Path(f"{path}.ran").exists()


def dropped(state: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in state.items() if k != key}


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({}, "neither a PromptSRC teacher"),
        ({"visual.conv1.weight": torch.zeros(2)}, "it holds 'visual.conv1.weight'"),
        (
            dropped(teacher_state(9), "image_encoder.transformer.resblocks.4.VPT_shallow"),
            "image_encoder.transformer in layer 8, but none in layer 4",
        ),
        (dropped(teacher_state(), "image_encoder.VPT"), "in layer 2, but none in layer 0"),
        (
            teacher_state() | {"image_encoder.VPT": torch.zeros(4, 9)},
            "one (prompts, width) matrix a layer",
        ),
        (
            teacher_state() | {"prompt_learner.ctx": torch.full((4, 6), torch.nan)},
            "not finite",
        ),
        (
            dropped(student_state(), "VPT_image_trans.conv1.1.running_var"),
            "'VPT_image_trans.conv1.1.running_var' is missing",
        ),
        (
            student_state() | {"VPT_image_trans.conv1.5.weight": torch.zeros(1)},
            "'VPT_image_trans.conv1.5.weight' is not of it",
        ),
        (
            student_state() | {"VPT_image_trans.conv1.3.weight": torch.zeros(7, 5, 1, 1)},
            "projector linear2.weight is (7, 5), not (7, 7)",
        ),
        (
            {k: v for k, v in student_state().items() if not k.startswith("image_encoder")},
            "no prompts 'image_encoder.VPT'",
        ),
    ],
)
def test_other_models(state: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as raised:
        official.load(save(tmp_path, state))
    assert said in str(raised.value)
