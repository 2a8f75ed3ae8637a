"""Fills a cache again and again in children that are killed; run by test_cache_long.py.

Arguments: CLIP name, pictures, cache, number of kills. Prints how many builds were cut short; fails
where a build that went on to its end left other bytes than an undisturbed one.
"""

import os
import random
import shutil
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


def contents(path: Path) -> dict[str, bytes]:
    """Every file of a cache, temporary ones too."""
    files = (p for p in path.rglob("*") if p.is_file())
    return {str(p.relative_to(path)): p.read_bytes() for p in files}


def build(teacher: Teacher, photos: str, cache: Path) -> None:
    build_cache(teacher, photos, cache, views=3, seed=5, shard_rows=64, content="features")


def killed(teacher: Teacher, photos: str, cache: Path, seconds: float) -> bool:
    """Build in a child that gets so many seconds; whether that was too short."""
    child = os.fork()
    if child == 0:
        build(teacher, photos, cache)
        os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def main(model: str, photos: str, place: str, kills: str) -> None:
    torch.set_num_threads(1)
    teacher = zero_shot_teacher(load_clip(model), CLASSES, TEMPLATES)
    cache = Path(place)
    if kills == "0":
        build(teacher, photos, cache)
        return
    undisturbed = cache.with_name("undisturbed-here")
    begun = time.monotonic()
    build(teacher, photos, undisturbed)
    seconds = time.monotonic() - begun  # however fast or busy the machine is
    expected = contents(undisturbed)
    rng = random.Random(0)
    cut = 0
    for _ in range(int(kills)):
        if killed(teacher, photos, cache, rng.uniform(0.0, seconds)):
            cut += 1
        else:
            assert contents(cache) == expected
            shutil.rmtree(cache)
    build(teacher, photos, cache)
    print(cut)


if __name__ == "__main__":
    main(*sys.argv[1:])
