"""Drawn pictures with exact annotations, questions about them, labels per patch, and grades for answers."""

from sphinx_fast.data.scene_grading import grade
from sphinx_fast.data.scene_questions import Question, corpus, examples, questions
from sphinx_fast.data.scene_targets import dense_targets
from sphinx_fast.data.scenes import Scene, scene, stream

__all__ = ["Question", "Scene", "corpus", "dense_targets", "examples", "grade", "questions", "scene", "stream"]
