"""Tokenizers and text towers of the package transformers, the real ones, small and made here.

Other tests put stubs in the place of tokenizers that would have to be downloaded; here those stubs
are compared with real ones of the same layout.
"""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import tiny_families
import torch
from promptkd import DistillConfig, Student
from promptkd.cli import main
from promptkd.clip import load_clip
from promptkd.errors import ModelError
from promptkd.prompts import PromptedNames, context_start
from promptkd.stages.distill import new_student
from promptkd.teacher import zero_shot_teacher
from safetensors.torch import save_file
from tiny import CLASSES, Models
from tiny_families import FAMILIES, StubTokenizer

transformers = pytest.importorskip("transformers", reason="needs the extra 'text'")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

NAMES = ("red thing", "a rather long name of a thing", "blue")
WORDS = [
    "a",
    "photo",
    "of",
    "the",
    "red",
    "blue",
    "green",
    "thing",
    "rather",
    "long",
    "name",
    "lemon",
]
# What stands around the words, and which tokens have which ids, in the tokenizers of three families.
LAYOUTS: dict[str, tuple[str, dict[str, int]]] = {
    "siglip": ("$A </s>", {"</s>": 1, "<unk>": 2}),
    "clipa": ("[CLS] $A [SEP]", {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102}),
    "worldwide": ("<s> $A </s>", {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}),
}
FIRST_WORD = 110
EMBED_DIM = 20


def save_tokenizer(folder: Path, family: str) -> None:
    """A tokenizer of whole words with the special tokens of a family's."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    around, special = LAYOUTS[family]
    vocabulary = special | {word: FIRST_WORD + place for place, word in enumerate(WORDS)}
    unknown = next(token for token in special if "unk" in token.lower())
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    used = [(token, place) for token, place in special.items() if token in around.split()]
    made.post_processor = processors.TemplateProcessing(single=around, special_tokens=used)
    padding = {"siglip": "</s>", "clipa": "[PAD]", "worldwide": "<pad>"}[family]
    kinds = {"pad_token": padding, "unk_token": unknown}
    if family == "clipa":
        kinds |= {"sep_token": "[SEP]", "cls_token": "[CLS]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **kinds).save_pretrained(folder)


@pytest.mark.parametrize("family", LAYOUTS)
def test_the_stubs_have_the_layout_of_real_tokenizers(family: str, tmp_path: Path) -> None:
    name = tiny_families.save(tmp_path / "model", family)
    save_tokenizer(tmp_path / "model", family)
    clip = load_clip(name)
    text = FAMILIES[family]["text_cfg"]
    stub = StubTokenizer("", text["context_length"], **text.get("tokenizer_kwargs", {}))
    real, stubs = clip.tokenize(list(NAMES)), stub(list(NAMES))
    assert real.shape == stubs.shape
    assert torch.equal(real >= FIRST_WORD, stubs >= FIRST_WORD)
    outside = real < FIRST_WORD
    assert torch.equal(real[outside], stubs[outside])
    assert context_start(clip.tokenize) == (0 if family == "siglip" else 1)


@pytest.mark.parametrize("family", LAYOUTS)
def test_text_with_a_real_tokenizer(family: str, tmp_path: Path) -> None:
    """Our tower against the library's; learned prompts take the place of "a photo of a"."""
    name = tiny_families.save(tmp_path / "model", family)
    save_tokenizer(tmp_path / "model", family)
    clip, model = load_clip(name), open_clip.create_model(name).eval()
    tokens = open_clip.get_tokenizer(name)(list(NAMES))
    assert torch.equal(clip.tokenize(list(NAMES)), tokens)
    text = clip.need_text("test")
    with torch.no_grad():
        torch.testing.assert_close(text(text.cut(tokens)), model.encode_text(tokens))
    prompted = PromptedNames(CLASSES, "a photo of a {}.", 4, clip.tokenize)
    start = context_start(clip.tokenize)
    whole = clip.tokenize([f"a photo of a {n.replace('_', ' ')}." for n in CLASSES])
    assert torch.equal(prompted.tokens[:, start + 4 :], whole[:, start + 4 :])


def save_hf_clip(folder: Path) -> str:
    """A CLIP whose text tower is a tiny XLM-RoBERTa, configured by the folder it lies in."""
    folder.mkdir()
    save_tokenizer(folder, "worldwide")
    transformers.XLMRobertaConfig(
        vocab_size=FIRST_WORD + len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=20,
        pad_token_id=1,
    ).save_pretrained(folder)
    cfg: dict[str, Any] = {
        "embed_dim": EMBED_DIM,
        "vision_cfg": FAMILIES["vit"]["vision_cfg"],
        "text_cfg": {
            "hf_model_name": str(folder),
            "hf_tokenizer_name": str(folder),
            "hf_model_pretrained": False,
            "hf_proj_type": "mlp",
            "hf_pooler_type": "mean_pooler",
            "context_length": 16,
        },
    }
    torch.manual_seed(0)
    state = {k: v.contiguous() for k, v in open_clip.CustomTextCLIP(**cfg).state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    config = {"model_cfg": cfg | {"custom_text": True}, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return f"local-dir:{folder}"


def test_a_text_tower_of_hugging_face_teaches_zero_shot(
    tmp_path: Path, models: Models, photos: Path
) -> None:
    name = save_hf_clip(tmp_path / "clip")
    clip, theirs = load_clip(name), open_clip.create_model(name).eval()
    tokens = clip.tokenize(list(NAMES))
    with torch.no_grad():
        ours = clip.need_text("test")(tokens)
        torch.testing.assert_close(ours, theirs.encode_text(tokens))
    with pytest.raises(ModelError, match=r"can't tune a teacher.* zero-shot teacher"):
        clip.need_prompted_text("tune a teacher")
    teacher = zero_shot_teacher(clip, CLASSES, ("a photo of a {}.",))
    student = new_student(load_clip(models.student), teacher, DistillConfig(prompt_depth=2))
    folder = tmp_path / "student"
    student.eval().save(folder, include_backbone=True)
    assert main(["classes", "add", str(folder), "a lemon"]) == 0
    wider = Student.load(folder)
    made = zero_shot_teacher(clip, [*CLASSES, "a lemon"], ("a photo of a {}.",)).class_vectors
    torch.testing.assert_close(wider.class_vectors, made)
    assert len(wider.predict(str(photos / CLASSES[0] / "00.png")).labels) == 4  # type: ignore[union-attr]


def test_a_folder_without_its_tokenizer_says_what_to_put_there(tmp_path: Path) -> None:
    """The package would make a tokenizer for which every word is unknown."""
    name = save_hf_clip(tmp_path / "clip")
    for file in (tmp_path / "clip").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match=r"put its files \(tokenizer\.json.*into '.*clip'"):
        load_clip(name)
