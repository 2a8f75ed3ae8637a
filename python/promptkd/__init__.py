"""Turn a large CLIP into a small, fast classifier for your own pictures, without labels."""

from promptkd.cache import FeatureCache, build_cache
from promptkd.class_names import ClassName
from promptkd.errors import PromptKDError
from promptkd.evaluate import Evaluation
from promptkd.stages.distill import DistillConfig, distill
from promptkd.stages.teach import TeachConfig, teach
from promptkd.student import Prediction, Student
from promptkd.teacher import Teacher

__all__ = [
    "ClassName",
    "DistillConfig",
    "Evaluation",
    "FeatureCache",
    "Prediction",
    "PromptKDError",
    "Student",
    "TeachConfig",
    "Teacher",
    "build_cache",
    "distill",
    "teach",
]
