"""Turn a large CLIP into a small, fast classifier for your own pictures, without labels."""

from promptkd.errors import PromptKDError
from promptkd.evaluate import Evaluation
from promptkd.stages.distill import DistillConfig, distill
from promptkd.stages.teach import TeachConfig, teach
from promptkd.student import Prediction, Student
from promptkd.teacher import Teacher

__all__ = [
    "DistillConfig",
    "Evaluation",
    "Prediction",
    "PromptKDError",
    "Student",
    "TeachConfig",
    "Teacher",
    "distill",
    "teach",
]
