"""Fills a cache again and again in children that are killed; run by test_cache_long.py.

Arguments: CLIP name, pictures, cache, number of kills. Prints how many builds were cut short.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from promptkd.cache import build_cache
from promptkd.clip import load_clip
from promptkd.teacher import Teacher, zero_shot_teacher
from tiny import CLASSES

TEMPLATES = ("a photo of a {}.",)


def build(teacher: Teacher, photos: str, cache: str) -> None:
    build_cache(teacher, photos, cache, views=3, seed=5, shard_rows=64, content="features")


def killed(teacher: Teacher, photos: str, cache: str, seconds: float) -> bool:
    """Build in a child that gets so many seconds; whether that was too short."""
    child = os.fork()
    if child == 0:
        build(teacher, photos, cache)
        os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def main(model: str, photos: str, cache: str, kills: str) -> None:
    torch.set_num_threads(1)
    teacher = zero_shot_teacher(load_clip(model), CLASSES, TEMPLATES)
    rng = random.Random(0)
    cut = sum(killed(teacher, photos, cache, rng.uniform(0.0, 0.6)) for _ in range(int(kills)))
    build(teacher, photos, cache)
    print(cut, len(list(Path(cache).rglob("*.tmp"))))


if __name__ == "__main__":
    main(*sys.argv[1:])
