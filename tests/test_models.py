"""What `promptkd models` says of every architecture of open_clip, built without memory for weights."""

import json
from collections import Counter
from pathlib import Path

import open_clip
import pytest
from promptkd.cli import main
from promptkd.errors import ModelError
from promptkd.families import Architecture, architectures, published_results

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def known() -> dict[str, Architecture]:
    return {a.name: a for a in architectures()}


def test_every_architecture_has_its_role(known: dict[str, Architecture]) -> None:
    assert set(known) == set(open_clip.list_models())
    for name, found in known.items():
        convolutional = name.startswith(("RN", "convnext", "swin", "vit_relpos"))
        fast = name.startswith("MobileCLIP") and name[-2:-1] == "S"
        from_hf = any(part in name for part in ("roberta", "mt5", "nllb"))
        if convolutional or fast:
            expected: tuple[str, ...] = ("zero-shot teacher",)
        else:
            expected = ("zero-shot teacher" if from_hf else "teacher", "student")
        assert found.roles == expected, name
    counts = Counter(found.roles for found in known.values())
    assert len(counts) == 3


# Parameters in millions and GFLOP as in open_clip's docs/model_profile.csv, which lacks ViTamin,
# MobileCLIP and PE-Core.
@pytest.mark.parametrize(
    ("name", "size", "millions", "gflop", "pooling", "prefix"),
    [
        ("ViT-B-16", 224, 86.19, 35.13, "class token", 1),
        ("ViT-L-14", 224, 304.0, 162.0, "class token", 1),
        ("ViT-H-14-CLIPA-336", 336, 632.5, 781.4, "average of patches", 1),
        ("EVA02-L-14-336", 336, 304.4, 381.9, "class token", 1),
        ("EVA01-g-14", 224, 1012.6, 534.1, "class token", 1),
        ("ViT-SO400M-14-SigLIP-384", 384, 428.2, 670.4, "attention pooling", 0),
        ("ViTamin-L", 224, 333.3, 149.8, "average of patches", 0),
        ("MobileCLIP-B", 224, 86.35, 35.42, "class token", 1),
        ("PE-Core-bigG-14-448", 448, 1882.0, 4118.6, "attention pooling", 0),
        ("RN50", 224, 38.32, 12.22, "", 0),
    ],
)
def test_sizes(
    known: dict[str, Architecture],
    name: str,
    size: int,
    millions: float,
    gflop: float,
    pooling: str,
    prefix: int,
) -> None:
    found = known[name].vision
    assert found.size == (size, size)
    assert found.parameters / 1e6 == pytest.approx(millions, rel=1e-3)
    assert found.gflop == pytest.approx(gflop, rel=2e-3)
    assert (found.pooling, found.prefix) == (pooling, prefix)


def test_text_towers(known: dict[str, Architecture]) -> None:
    assert known["ViT-B-16"].text == "causal, read at the end token (largest id)"
    assert known["ViT-H-14-worldwide"].text == "causal, read at the end token (id 2)"
    assert known["ViT-L-14-CLIPA"].text == "not causal, read at the last token; nothing cut"
    assert known["ViT-B-16-SigLIP2"].text == "not causal, read at the last token; nothing cut"
    assert "added class token" in known["coca_ViT-B-32"].text
    assert known["mt5-base-ViT-B-32"].text.startswith("Hugging Face's (google/mt5-base)")


def test_published_results_are_of_known_weights(known: dict[str, Architecture]) -> None:
    for (name, tag), accuracy in published_results().items():
        assert tag in known[name].tags
        assert 0 < accuracy < 90
    assert known["ViT-L-14"].tags["openai"] == 75.54
    assert known["ViT-H-14-378-quickgelu"].best == ("dfn5b", 84.37)
    assert known["ViT-B-16"].tags["dfn2b"] == known["ViT-B-16-quickgelu"].tags["dfn2b"] == 76.24
    assert known["ViT-e-14"].best is None


def test_the_page_has_the_commands_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--families"]) == 0
    page = (DOCS / "families.md").read_text(encoding="utf-8")
    begin, end = "<!-- families: begin -->\n", "<!-- families: end -->"
    assert page.split(begin)[1].split(end)[0] == capsys.readouterr().out


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "vit-b-16-quick"]) == 0
    shown = capsys.readouterr().out
    for part in ("ViT-B-16-quickgelu", "dfn2b", "76.2", "teacher, student"):
        assert part in shown
    assert main(["models", "RN101", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)[0]
    assert first["roles"] == ["zero-shot teacher"]
    assert first["refusal"] == "the image tower ModifiedResNet is not made of plain blocks"
    assert first["imagenet_zero_shot"]["openai"] == pytest.approx(62.3, abs=0.1)
    assert main(["models", "no-such-thing"]) == 1
    assert "no architecture of open_clip has 'no-such-thing'" in capsys.readouterr().err
    with pytest.raises(ModelError):
        list(architectures("no-such-thing"))
