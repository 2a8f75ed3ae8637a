"""Regenerates the inputs of a golden set from its config.json, bit for bit, with numpy alone.

Every array is drawn as: one PCG64 stream a group, seed = the set's seed + the group's offset; for
each key in sorted order, mean + std · standard_normal(shape), then float32 → float16 → float32, so
that every value is exact in half precision like OpenAI's checkpoints. std None is a constant.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

LOGIT_SCALE = 2.6592
VOCAB, CONTEXT = 49408, 77
OFFSETS = {
    "teacher": 1,
    "student": 2,
    "teacher_prompts": 3,
    "student_prompts": 4,
    "projector": 5,
    "src_init": 6,
    "data": 7,
    "order": 8,
    "student_text_prompts": 9,
}

Array = NDArray[Any]
Spec = dict[str, tuple[tuple[int, ...], float, float | None]]


def _block_spec(prefix: str, width: int) -> Spec:
    return {
        prefix + "attn.in_proj_weight": ((3 * width, width), 0.0, 1.2 * width**-0.5),
        prefix + "attn.in_proj_bias": ((3 * width,), 0.0, 0.05),
        prefix + "attn.out_proj.weight": ((width, width), 0.0, 0.7 * width**-0.5),
        prefix + "attn.out_proj.bias": ((width,), 0.0, 0.05),
        prefix + "ln_1.weight": ((width,), 1.0, 0.1),
        prefix + "ln_1.bias": ((width,), 0.0, 0.1),
        prefix + "mlp.c_fc.weight": ((4 * width, width), 0.0, width**-0.5),
        prefix + "mlp.c_fc.bias": ((4 * width,), 0.0, 0.05),
        prefix + "mlp.c_proj.weight": ((width, 4 * width), 0.0, 0.7 * (4 * width) ** -0.5),
        prefix + "mlp.c_proj.bias": ((width,), 0.0, 0.05),
        prefix + "ln_2.weight": ((width,), 1.0, 0.1),
        prefix + "ln_2.bias": ((width,), 0.0, 0.1),
    }


def clip_spec(
    image: int, v_width: int, v_layers: int, patch: int, embed: int, t_width: int, t_layers: int
) -> Spec:
    """A CLIP in OpenAI's layout."""
    tokens = (image // patch) ** 2 + 1
    spec: Spec = {
        "visual.class_embedding": ((v_width,), 0.0, 1.0),
        "visual.conv1.weight": ((v_width, 3, patch, patch), 0.0, (3 * patch * patch) ** -0.5),
        "visual.positional_embedding": ((tokens, v_width), 0.0, 0.3),
        "visual.proj": ((v_width, embed), 0.0, v_width**-0.5),
        "token_embedding.weight": ((VOCAB, t_width), 0.0, 0.3),
        "positional_embedding": ((CONTEXT, t_width), 0.0, 0.1),
        "text_projection": ((t_width, embed), 0.0, t_width**-0.5),
        "logit_scale": ((), LOGIT_SCALE, None),
    }
    for norm, width in (
        ("visual.ln_pre", v_width),
        ("visual.ln_post", v_width),
        ("ln_final", t_width),
    ):
        spec |= {f"{norm}.weight": ((width,), 1.0, 0.1), f"{norm}.bias": ((width,), 0.0, 0.1)}
    for layer in range(v_layers):
        spec |= _block_spec(f"visual.transformer.resblocks.{layer}.", v_width)
    for layer in range(t_layers):
        spec |= _block_spec(f"transformer.resblocks.{layer}.", t_width)
    return spec


def vision_prompt_spec(model: dict[str, int], std: float, depth: int = 9) -> Spec:
    width, layers = model["v_width"], model["v_layers"]
    deep = [
        f"image_encoder.transformer.resblocks.{i}.VPT_shallow" for i in range(1, min(depth, layers))
    ]
    return dict.fromkeys(["image_encoder.VPT", *deep], ((4, width), 0.0, std))


def text_prompt_spec(
    model: dict[str, int], std: float, ctx_std: float | None, depth: int = 9
) -> Spec:
    width, layers = model["t_width"], model["t_layers"]
    deep = [
        f"text_encoder.transformer.resblocks.{i}.VPT_shallow" for i in range(1, min(depth, layers))
    ]
    spec: Spec = dict.fromkeys(deep, ((4, width), 0.0, std))
    if ctx_std is not None:
        spec["prompt_learner.ctx"] = ((4, width), 0.0, ctx_std)
    return spec


def projector_spec(in_dim: int, out_dim: int) -> Spec:
    prefix = "VPT_image_trans.conv1."
    return {
        prefix + "0.weight": ((out_dim, in_dim, 1, 1), 0.0, in_dim**-0.5),
        prefix + "0.bias": ((out_dim,), 0.0, 0.1),
        prefix + "1.weight": ((out_dim,), 1.0, 0.1),
        prefix + "1.bias": ((out_dim,), 0.0, 0.1),
        prefix + "3.weight": ((out_dim, out_dim, 1, 1), 0.0, out_dim**-0.5),
        prefix + "3.bias": ((out_dim,), 0.0, 0.1),
    }


def half_exact(values: Array) -> Array:
    return np.asarray(values).astype(np.float32).astype(np.float16).astype(np.float32)


def draw(spec: Spec, seed: int) -> dict[str, Array]:
    rng = np.random.Generator(np.random.PCG64(seed))
    out = {}
    for key in sorted(spec):
        shape, mean, std = spec[key]
        out[key] = half_exact(
            np.full(shape, mean) if std is None else mean + std * rng.standard_normal(shape)
        )
    return out


def build(config: dict[str, Any]) -> dict[str, dict[str, Array]]:
    """All inputs of a set: both models, prompts, projector, images and batch orders."""
    seed, teacher, student = config["seed"], config["teacher"], config["student"]
    specs = {
        "teacher": clip_spec(config["image"], **teacher),
        "student": clip_spec(config["image"], **student),
        "teacher_prompts": vision_prompt_spec(teacher, 0.1) | text_prompt_spec(teacher, 0.1, 0.3),
        "student_prompts": vision_prompt_spec(student, 0.02),
        "projector": projector_spec(student["embed"], teacher["embed"]),
        "src_init": vision_prompt_spec(teacher, 0.02) | text_prompt_spec(teacher, 0.02, None),
    }
    out = {group: draw(spec, seed + OFFSETS[group]) for group, spec in specs.items()}
    # One stream over vision and text, of which only the text side is used.
    both = vision_prompt_spec(student, 0.1) | text_prompt_spec(student, 0.1, 0.3)
    drawn = draw(both, seed + OFFSETS["student_text_prompts"])
    out["student_text_prompts"] = {
        k: v for k, v in drawn.items() if not k.startswith("image_encoder")
    }
    out["data"] = _data(config) | _orders(config)
    return out


def _data(config: dict[str, Any]) -> dict[str, Array]:
    classes, shape = len(config["classnames"]), (3, config["image"], config["image"])
    rng = np.random.Generator(np.random.PCG64(config["seed"] + OFFSETS["data"]))
    pattern = rng.standard_normal((classes, *shape))
    out: dict[str, Array] = {}
    for part, number in (
        ("train", classes * config["per_class_train"]),
        ("test", config["n_test"]),
    ):
        labels = np.arange(number) % classes
        noise = rng.standard_normal((number, *shape))
        out[f"{part}_images"] = half_exact(0.7 * pattern[labels] + 0.7 * noise)
        out[f"{part}_labels"] = labels
    return out


def _orders(config: dict[str, Any]) -> dict[str, Array]:
    classes = len(config["classnames"])
    labels = np.arange(classes * config["per_class_train"]) % classes
    rng = np.random.Generator(np.random.PCG64(config["seed"] + OFFSETS["order"]))

    def order(pool: Array, batch: int, epochs: int) -> Array:
        rows = []
        for _ in range(epochs):
            shuffled = pool[rng.permutation(len(pool))]
            steps = len(pool) // batch
            rows.append(shuffled[: steps * batch].reshape(steps, batch))
        return np.concatenate(rows)

    base = np.flatnonzero(labels < math.ceil(classes / 2))
    orders = {"order_src": order(base, config["src"]["batch"], config["src"]["epochs"])}
    for name, run in config["kd"].items():
        orders[f"order_{name}"] = order(np.arange(len(labels)), run["batch"], run["epochs"])
    return orders
