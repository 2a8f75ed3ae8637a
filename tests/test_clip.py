"""Loading models: names, files, activations, preprocessing, and clear errors."""

import copy
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from promptkd.clip import Clip, Preprocess, load_clip
from promptkd.errors import CheckpointError, ModelError
from safetensors.torch import load_file, save_file
from tiny import Models, model_cfg, save_model


def activation(clip: Clip) -> str:
    """Which of the two the tower computes, by its value at 1."""
    block: Any = clip.vision.trunk.transformer.resblocks[0]
    value = float(block.mlp.gelu(torch.ones(1)))
    return {0.8458: "QuickGELU", 0.8413: "GELU"}[round(value, 4)]


@pytest.fixture
def small_architectures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """'ViT-B-16' and its tags become small and come from a patched download."""
    weights = (
        save_model(tmp_path / "download", model_cfg(48, 32, 24), 3) / "open_clip_model.safetensors"
    )
    small = model_cfg(48, 32, 24)
    small.pop("quick_gelu")
    for name in ("open_clip.factory", "open_clip"):
        monkeypatch.setattr(f"{name}.get_model_config", lambda _: copy.deepcopy(small))
    monkeypatch.setattr("open_clip.factory.download_pretrained", lambda *_a, **_k: str(weights))


@pytest.mark.usefixtures("small_architectures")
@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("openai", "QuickGELU"),
        ("dfn2b", "QuickGELU"),
        ("metaclip_400m", "QuickGELU"),
        ("laion2b_s34b_b88k", "GELU"),
        ("datacomp_xl_s13b_b90k", "GELU"),
    ],
)
def test_activation_belongs_to_the_tag(tag: str, expected: str) -> None:
    clip = load_clip(f"ViT-B-16/{tag}")
    assert activation(clip) == expected
    assert clip.model_cfg["quick_gelu"] is (expected == "QuickGELU")
    if tag == "openai":
        assert clip.preprocess.mean == pytest.approx(open_clip.OPENAI_DATASET_MEAN)


def openai_like() -> Any:
    """A model in OpenAI's layout: QuickGELU, heads 64 wide."""
    cfg = model_cfg(48, 64, 24)
    cfg["vision_cfg"]["head_width"] = 64
    cfg["text_cfg"] |= {"width": 64, "heads": 1}
    torch.manual_seed(4)
    return open_clip.CLIP(**cfg | {"quick_gelu": True}).eval()


class Scripted(torch.nn.Module):
    """What a TorchScript archive of a CLIP looks like from outside: a module with its tensors."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        for name, tensor in model.state_dict().items():
            parent: torch.nn.Module = self
            *path, leaf = name.split(".")
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, torch.nn.Module())
                parent = getattr(parent, part)
            parent.register_buffer(leaf, tensor.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize("form", ["state_dict", "torchscript", "safetensors"])
def test_files_in_openai_layout(form: str, tmp_path: Path) -> None:
    model = openai_like()
    path = tmp_path / ("model.safetensors" if form == "safetensors" else "model.pt")
    if form == "state_dict":
        torch.save(model.state_dict(), path)
    elif form == "safetensors":
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    else:
        _save_torchscript(model, path)
    clip = load_clip(path)
    assert activation(clip) == "QuickGELU"
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(
            clip.vision(images), model.encode_image(images), rtol=1e-5, atol=1e-5
        )


def _save_torchscript(model: torch.nn.Module, path: Path) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is old, and so are OpenAI's files
        torch.jit.save(torch.jit.script(Scripted(model)), str(path))


def test_training_checkpoint_needs_its_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = model_cfg(48, 32, 24)
    torch.manual_seed(5)
    model = open_clip.CLIP(**copy.deepcopy(cfg))
    path = tmp_path / "epoch_1.pt"
    state = {f"module.{k}": v for k, v in model.state_dict().items()}
    torch.save({"epoch": 1, "state_dict": state}, path)
    with pytest.raises(ModelError, match="doesn't say its architecture"):
        load_clip(path)
    monkeypatch.setattr("open_clip.get_model_config", lambda _: copy.deepcopy(cfg))
    assert activation(load_clip(f"ViT-B-16/{path}")) == "GELU"


def test_model_object_and_its_own_numbers(models: Models) -> None:
    model = open_clip.create_model(models.student)
    clip = load_clip(model)
    assert clip.preprocess == Preprocess(
        (48, 48), (0.1, 0.2, 0.3), (0.5, 0.5, 0.5), "bilinear", "squash"
    )
    images = torch.randn(3, 3, 48, 48)
    tokens = clip.tokenize(["a photo of a cat.", "a"])
    with torch.no_grad():
        torch.testing.assert_close(
            clip.vision(images), model.encode_image(images), rtol=1e-5, atol=1e-5
        )
        text = clip.need_text("test")(tokens)
        torch.testing.assert_close(text, model.encode_text(tokens), rtol=1e-5, atol=1e-5)
    assert clip.image_hash == load_clip(models.student).image_hash
    assert clip.image_hash != load_clip(models.teacher).image_hash


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_is_stored_once(models: Models, dtype: str) -> None:
    clip = load_clip(models.student, precision=dtype)
    assert {b.dtype for b in clip.vision.buffers() if b.is_floating_point()} <= {clip.vision.dtype}
    assert {p.dtype for p in clip.vision.parameters()} <= {clip.vision.dtype}
    images = torch.randn(3, 3, 48, 48)
    with torch.no_grad():
        exact = load_clip(models.student).vision(images)
        rough = clip.vision(images).float()
    assert torch.nn.functional.cosine_similarity(exact, rough).min() > 0.99


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ViT-B16/openai", "did you mean ViT-B-16"),
        ("ViT-B-16/opnai", "known tags: openai"),
        ("ViT-B-16", "names no weights"),
        ("RN50", "names no weights"),
        ("no/such/file.pt", "no file, folder or architecture"),
        ("local-dir:/nowhere", "can't be loaded"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_clip(name)


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise OSError("Connection refused")

    monkeypatch.setattr("open_clip.factory.download_pretrained", fail)
    with pytest.raises(ModelError, match="not in the local cache and can't be downloaded"):
        load_clip("ViT-B-16/openai")


def test_other_objects_are_refused() -> None:
    with pytest.raises(ModelError, match="not Linear"):
        load_clip(torch.nn.Linear(1, 1))


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", model_cfg(48, 32, 24), 6)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["layers"] = 5
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError,
        match=r"architecture: 24 missing \(visual.*\.3\.",
    ):
        load_clip(folder)


def test_damaged_files(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match="no readable weights file"):
        load_clip(tmp_path / "model.pt")
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(CheckpointError, match="no readable weights file"):
        load_clip(tmp_path / "model.safetensors")


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (exec, ("raise SystemExit('code from a weights file ran')",))


def test_pickled_code_does_not_run(tmp_path: Path) -> None:
    torch.save({"visual.proj": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="no readable weights file"):
        load_clip(tmp_path / "evil.pt")


def test_too_many_prompts(models: Models) -> None:
    clip = load_clip(models.student)
    with pytest.raises(ModelError, match="lower prompt_depth to 3"):
        clip.vision(torch.randn(1, 3, 48, 48), [torch.zeros(4, 32)] * 4)


def test_weights_are_untouched_by_loading(models: Models) -> None:
    folder = Path(models.student.removeprefix("local-dir:"))
    stored = load_file(folder / "open_clip_model.safetensors")
    model = open_clip.create_model(models.student)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    load_clip(model, precision="bf16")
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(torch.equal(before[k], v) for k, v in stored.items())
