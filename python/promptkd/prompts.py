"""Deep prompts, the only thing that PromptKD trains inside a tower (IVLP).

Vision: P tokens are appended to the patches; layers 1..d-1 replace what the layer before made of
them. Text: tokens 1..P ("a photo of a") are replaced alike, shared by all classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from promptkd.class_names import plain_name, texts_of
from promptkd.errors import CheckpointError, ModelError

INIT_STD = 0.02


class DeepPrompts(nn.Module):
    """One (P, width) tensor for each of the first `depth` layers, in float32."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.layers = nn.ParameterList([nn.Parameter(t.detach().clone()) for t in tensors])

    @classmethod
    def random(
        cls, num_prompts: int, width: int, depth: int, generator: torch.Generator
    ) -> DeepPrompts:
        """Normal with standard deviation 0.02, as in the paper's code."""
        return cls(
            [INIT_STD * torch.randn(num_prompts, width, generator=generator) for _ in range(depth)]
        )

    @property
    def depth(self) -> int:
        """Number of prompted layers."""
        return len(self.layers)

    @property
    def num_prompts(self) -> int:
        """Tokens a layer."""
        return int(self.layers[0].shape[0])

    def forward(self) -> list[Tensor]:
        """The tensors, layer by layer."""
        return list(self.layers)


def stacked_prompts(
    tensors: dict[str, Tensor], prefix: str, width: int | None, layers: int | None, path: Any
) -> DeepPrompts | None:
    """The prompts stored as `prefix.0`, `prefix.1`, …, or None where there are none."""
    depth = sum(key.startswith(prefix + ".") for key in tensors)
    if depth == 0:
        return None
    try:
        found = [tensors[f"{prefix}.{i}"] for i in range(depth)]
    except KeyError as error:
        raise CheckpointError(f"'{path}' lacks the tensor {error}") from error
    wrong = [t for t in found if t.ndim != 2 or t.shape != found[0].shape]
    if (
        wrong
        or (width is not None and found[0].shape[1] != width)
        or (layers is not None and depth > layers)
    ):
        raise CheckpointError(
            f"'{path}' holds {prefix} of shape {depth} x {tuple(found[0].shape)}, which don't fit "
            f"a tower of {layers} layers and width {width}"
        )
    return DeepPrompts(found)


Tokenize: TypeAlias = Callable[[Sequence[str]], Tensor]


def context_start(tokenize: Tokenize) -> int:
    """How many tokens stand before the words of every sentence: 1 for CLIP's, 0 for SigLIP's."""
    return _num_alike(tokenize(["photo", "cat"]))


def _num_alike(rows: Tensor) -> int:
    """How many leading tokens all rows of (N, L) share."""
    return int((rows == rows[:1]).all(dim=0).int().cumprod(0).sum())


class PromptedNames:
    """Class names tokenised into a template whose leading words the text prompts replace.

    A name with texts of its own gives several rows: its templates' words after the name stand in
    place of the template's, and each description follows the sentence with the name.

    Attributes:
        tokens: (S, L) ids: start tokens, P context slots, the rest of the sentence, padding.
        counts: (C,) rows of each class, which follow each other; None where each has one, S = C.
        context: (P,) ids of the words that the prompts start from.
    """

    def __init__(
        self, names: Sequence[str], template: str, num_prompts: int, tokenize: Tokenize
    ) -> None:
        prefix, found, _ = template.partition("{}")
        if not found or not prefix.strip():
            raise ModelError(
                f"the template '{template}' has no words before '{{}}' for the prompts to replace; "
                "use one like 'a photo of a {}.'"
            )
        first = context_start(tokenize)
        alone = prefix.strip()
        rows = tokenize([alone, f"{alone} photo", f"{alone} cat"])
        start, rest = rows[0, :first], _num_alike(rows)
        words = rows[0, first:rest]
        sentences = [_prompted_sentences(name, template) for name in names]
        counts = [len(texts) for texts in sentences]
        self.counts = torch.tensor(counts) if max(counts) > 1 else None
        full = tokenize_whole(tokenize, [text for texts in sentences for text in texts], names)
        if not bool((full[:, :rest] == torch.cat([start, words])).all()):
            raise ModelError(
                f"the words of the template '{template}' before '{{}}' merge with a name"
            )
        # More prompts than words: start from the words again, in a circle.
        self.context = words[torch.arange(num_prompts) % len(words)]
        slots = self.context.expand(len(full), -1)
        padding = tokenize(["photo"])[0, -1]
        tokens = torch.cat([full[:, :first], slots, full[:, rest:]], dim=1)
        length = full.shape[1]
        if bool((tokens[:, length:] != padding).any()):
            raise ModelError(f"{num_prompts} prompts leave no room for the longest class name")
        missing = padding.expand(len(full), max(0, length - tokens.shape[1]))
        self.tokens = torch.cat([tokens[:, :length], missing], dim=1)


def tokenize_whole(tokenize: Tokenize, sentences: Sequence[str], names: Sequence[str]) -> Tensor:
    """Sentences as token ids (S, L); of names with texts, all of every sentence must fit.

    Raises:
        ModelError: a sentence that the text tower would read only the beginning of.
    """
    tokens = tokenize(sentences)
    if any(texts_of(name) is not None for name in names):
        cut = (tokens[:, -1] != tokenize(["photo"])[0, -1]).nonzero().flatten().tolist()
        if cut:
            raise ModelError(
                f"'{sentences[cut[0]]}' is longer than the {tokens.shape[1]} tokens that the text "
                "tower reads; shorten this template or description"
            )
    return tokens


def _prompted_sentences(name: str, template: str) -> list[str]:
    texts, plain = texts_of(name), plain_name(name)
    if texts is None:
        return [template.format(plain)]
    prefix, _, end = template.partition("{}")
    ends = dict.fromkeys(t.partition("{}")[2] for t in texts[0]) or {end: None}
    named = [f"{prefix}{plain}{own_end}" for own_end in ends]
    return [*named, *(f"{named[0]} {description}" for description in texts[1])]


def mean_by_class(rows: Tensor, counts: Tensor | None) -> Tensor:
    """Mean over the rows (S, D) of each class, (C, D); counts (C,) of them, None for one each."""
    if counts is None:
        return rows
    return torch.segment_reduce(rows, "mean", lengths=counts.to(rows.device), axis=0)
