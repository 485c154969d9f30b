"""Questions about rendered scenes, answered by six frozen experts."""

from r2t2_jax.models.scenes.model import ScenesConfig, ScenesModel, embed_question, frozen, picture_statistics
from r2t2_jax.models.scenes.vocabulary import ANSWERS, COLORS, NO_COLOR, NO_SHAPE, SHAPES, TEMPLATES, question_text

__all__ = [
    "ANSWERS",
    "COLORS",
    "NO_COLOR",
    "NO_SHAPE",
    "SHAPES",
    "TEMPLATES",
    "ScenesConfig",
    "ScenesModel",
    "embed_question",
    "frozen",
    "picture_statistics",
    "question_text",
]
