"""Reproducing the paper on miniature trees with tiny models: cells, protocols, tables, restarts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from promptkd.data.sources import ImageList, PublishedNames, check_class_names, pictures_in
from promptkd.errors import DataError
from promptkd.stages.distill import DistillConfig, distill
from promptkd.stages.progress import Progress
from promptkd.stages.teach import TeachConfig, teach
from tiny import Models

QUIET = Progress(quiet=True)


def test_published_names_may_repeat_and_ones_own_may_not(photos: Path, models: Models) -> None:
    """ImageNet has two classes called "missile": both stages keep them apart by their places."""
    names = ("missile", "green thing", "missile")
    with pytest.raises(DataError, match=r"'missile' stands twice \(places 1 and 3\)"):
        check_class_names(names)
    with pytest.raises(DataError, match="class name 2 of 2 is empty"):
        check_class_names(PublishedNames(["a", " "]))
    found = pictures_in(photos)
    rows = np.arange(len(found)) // 12
    images = ImageList(found.paths, found.names, rows, PublishedNames(names))
    config = TeachConfig(epochs=1, max_steps=2, shots=2, templates=("a photo of a {}.",))
    teacher = teach(images, model=models.teacher, config=config, progress=QUIET)
    assert teacher.class_names == names
    assert teacher.class_vectors[0].equal(teacher.class_vectors[2])
    epochs = []
    student = distill(
        images,
        teacher=teacher,
        student=models.student,
        config=DistillConfig.paper("dtd", num_classes=3, epochs=2, batch_size=18),
        progress=QUIET,
        on_epoch=lambda epoch, pupil: epochs.append((epoch, pupil.training)),
    )
    assert student.class_names == names
    assert epochs == [(1, False), (2, False)]
    assert not student.training
