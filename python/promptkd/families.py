"""What open_clip knows: sizes of its models, and what each can be here; nothing is downloaded."""

from __future__ import annotations

import csv
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from promptkd.errors import ModelError
from promptkd.loading import open_clip_package, quiet
from promptkd.text_tower import TextTower, refusal_of
from promptkd.towers import layout_of

TUNED, STUDENT, ZERO_SHOT = "teacher", "student", "zero-shot teacher"
_RESULTS = Path(__file__).parent / "model_data" / "imagenet_zero_shot.csv"
# Names of open_clip's architectures, first match; what tells families apart is how they are read.
_FAMILIES = (
    ("CoCa", r"^coca_(?!roberta)"),
    ("Hugging Face text", r"roberta|mt5|nllb"),
    ("CLIPA", r"CLIPA"),
    ("MetaCLIP 2 (worldwide)", r"worldwide"),
    ("EVA-01", r"EVA01"),
    ("EVA-02", r"EVA02"),
    ("SigLIP, SigLIP2", r"SigLIP"),
    ("PE-Core", r"PE-Core"),
    ("ViTamin", r"ViTamin"),
    ("MobileCLIP", r"MobileCLIP"),
    ("ResNet", r"^RN"),
    ("ConvNeXt", r"convnext"),
    ("ViTs of timm", r"vit_|swin"),
    ("ViT (OpenAI, LAION, DataComp, DFN, MetaCLIP)", r"^ViT"),
)


@dataclass(frozen=True, slots=True)
class Vision:
    """An image tower.

    Attributes:
        size: of the pictures, (height, width).
        parameters: how many.
        gflop: for one picture, a multiplication and an addition counting as two.
        prefix: tokens before the patches; 0 where it takes no prompts.
        pooling: what the features are read from; empty where it takes no prompts.
        refusal: why it takes no prompts; empty where it does.
    """

    size: tuple[int, int]
    parameters: int
    gflop: float
    prefix: int
    pooling: str
    refusal: str


@dataclass(frozen=True, slots=True)
class Architecture:
    """An architecture of open_clip.

    Attributes:
        name: as in "name/tag".
        family: see `family_table`.
        vision: its image tower.
        text: how the text tower reads a sentence.
        prompted_text: whether it takes prompts.
        tags: pretrained weights, with their published zero-shot ImageNet accuracy in %, or None.
    """

    name: str
    family: str
    vision: Vision
    text: str
    prompted_text: bool
    tags: Mapping[str, float | None]

    @property
    def roles(self) -> tuple[str, ...]:
        """What it can be."""
        if self.vision.refusal:
            return (ZERO_SHOT,)
        return (TUNED if self.prompted_text else ZERO_SHOT, STUDENT)

    @property
    def best(self) -> tuple[str, float] | None:
        """The tag with the best published accuracy, and that."""
        known = {tag: value for tag, value in self.tags.items() if value is not None}
        return max(known.items(), key=lambda item: item[1]) if known else None


def architectures(pattern: str = "") -> Iterator[Architecture]:
    """The architectures whose name contains `pattern` (case doesn't matter), one by one.

    Raises:
        ModelError: none does.
    """
    open_clip = open_clip_package()
    names = [n for n in open_clip.list_models() if pattern.lower() in n.lower()]
    if not names:
        raise ModelError(f"no architecture of open_clip has '{pattern}' in its name")
    results = published_results()
    for name in sorted(names, key=str.lower):
        cfg = open_clip.get_model_config(name)
        # The same weights have two names; the activation is the tag's in any case.
        plain = name.removesuffix("-quickgelu")
        twin = plain if plain != name else f"{name}-quickgelu"
        tags = open_clip.list_pretrained_tags_by_model(name)
        text, prompted = _text(json.dumps(cfg["text_cfg"]))
        yield Architecture(
            name=name,
            family=next(family for family, part in _FAMILIES if re.search(part, name)),
            vision=_vision(int(cfg["embed_dim"]), json.dumps(cfg["vision_cfg"])),
            text=text,
            prompted_text=prompted,
            tags={tag: results.get((name, tag), results.get((twin, tag))) for tag in tags},
        )


@functools.cache
def published_results() -> dict[tuple[str, str], float]:
    """Zero-shot ImageNet top-1 in % by (architecture, tag), as open_clip publishes it."""
    with _RESULTS.open(encoding="utf-8", newline="") as file:
        return {(r["architecture"], r["tag"]): float(r["top1"]) for r in csv.DictReader(file)}


@functools.cache
def _vision(embed_dim: int, cfg: str) -> Vision:
    """Of a configuration as JSON; the tower is built without memory for its weights."""
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(cfg).items()}
    settings["timm_model_pretrained"] = False
    with quiet(), torch.device("meta"), torch.no_grad(), _shapes() as shapes:
        visual = _build_vision_tower(embed_dim, CLIPVisionCfg(**settings)).eval()
        prefix, pooling, refusal = 0, "", ""
        parameters = sum(p.numel() for p in visual.parameters())
        size = visual.image_size
        height, width = (size, size) if isinstance(size, int) else size
        picture = torch.empty(1, 3, height, width)
        try:
            layout = layout_of(visual)
            prefix, pooling = layout.num_prefix, layout.pooling
            flop = _flop_by_block(visual, shapes, picture)
        except ModelError as error:
            refusal = str(error)
            flop = shapes.count(visual, picture)
    return Vision((height, width), parameters, flop / 1e9, prefix, pooling, refusal)


def _flop_by_block(visual: Any, shapes: _Shapes, picture: torch.Tensor) -> int:
    """Of a tower of equal blocks, from one and two of them: less to run."""
    owner, name = (visual.trunk, "blocks") if hasattr(visual, "trunk") else (None, "")
    if owner is None:
        owner, name = visual.transformer, "resblocks"
    blocks = getattr(owner, name)
    counts = []
    for number in (1, 2):
        setattr(owner, name, blocks[:number])
        counts.append(shapes.count(visual, picture))
    return counts[0] + (len(blocks) - 1) * (counts[1] - counts[0])


class _Shapes(TorchDispatchMode):
    """Skips what fills tensors, and counts the operations of matrix products and convolutions."""

    flop = 0

    def count(self, module: Any, *args: Any) -> int:
        """Of one call."""
        before = self.flop
        module(*args)
        return self.flop - before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.endswith("_"):
            return args[0]  # in place, which changes no shape
        out = func(*args, **(kwargs or {}))
        counter = flop_registry.get(func._overloadpacket)
        if counter is not None:
            self.flop += counter(*args, **(kwargs or {}), out_val=out)
        return out


def _shapes() -> _Shapes:
    return _Shapes()  # type: ignore[no-untyped-call]


@functools.cache
def _text(cfg: str) -> tuple[str, bool]:
    """How a text tower reads, and whether it takes prompts; a Hugging Face one isn't built."""
    from open_clip.model import CLIPTextCfg, _build_text_tower

    settings = json.loads(cfg)
    if "hf_model_name" in settings:
        return f"Hugging Face's ({settings['hf_model_name']}), run as it is", False
    with quiet(), torch.device("meta"), torch.no_grad(), _shapes():
        small = {"layers": 1, "width": 8, "heads": 1, "vocab_size": 8}  # it reads as the large one
        text = _build_text_tower(8, CLIPTextCfg(**settings | small))
        if refusal := refusal_of(text):
            return refusal, False
        tower = TextTower(text)
    return _reading(tower, settings), True


def _reading(tower: TextTower, settings: Mapping[str, Any]) -> str:
    sight = "causal" if tower.is_causal else "not causal"
    if tower.class_token is not None:
        return f"{sight}, read at an added class token, padding masked"
    where = {
        "argmax": "the end token (largest id)",
        "eos": f"the end token (id {settings.get('eos_id')})",
        "last": "the last token",
        "first": "the first token",
    }[tower.pooling]
    return f"{sight}, read at {where}" + ("" if tower.may_cut else "; nothing cut")


def family_table() -> str:
    """The families of open_clip as a table in Markdown: where prompts go and who sees them."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for found in architectures():
        groups.setdefault((found.family, *_facts(found)), []).append(found.name)
    order = {family: number for number, (family, _) in enumerate(_FAMILIES)}
    head = ("family", "models", *_FACTS)
    rows = [
        (key[0], _short(names), *key[1:])
        for key, names in sorted(groups.items(), key=lambda item: (order[item[0][0]], item[0]))
    ]
    lines = ["| " + " | ".join(row) + " |" for row in [head, tuple("---" for _ in head), *rows]]
    return "\n".join(lines)


_FACTS = ("vision prompts", "features read from", "text", "text prompts", "can be")


def _facts(found: Architecture) -> tuple[str, ...]:
    vision = found.vision
    before = {0: "", 1: "class token and "}.get(vision.prefix, "class and register tokens and ")
    text = re.sub(r" \(.*\), run", ", run", found.text)
    is_clips = "Hugging" not in found.text
    return (
        "none: " + vision.refusal.removeprefix("the image tower ")
        if vision.refusal
        else f"behind {before}patches",
        "" if vision.refusal else f"{vision.pooling}; prompts not seen",
        text,
        "behind the start token, if there is one" if is_clips and found.prompted_text else "none",
        ", ".join(found.roles),
    )


def _short(names: Sequence[str], count: int = 2) -> str:
    shown = ", ".join(f"`{n}`" for n in names[:count])
    return shown if len(names) <= count else f"{shown} and {len(names) - count} more"
