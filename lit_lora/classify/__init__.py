"""Classification, regression and sequence-to-sequence with encoders and encoder-decoders from transformers.

Model and tokenizer are transformers', which is imported only when one is opened; methods, loop and files are those of
all recipes.
"""

from lit_lora.classify.checkpoint import Pretrained, head_of, is_encoder, load_with_head, read_pretrained
from lit_lora.classify.opened import OpenedClassifier, open_classifier
from lit_lora.classify.predict import Prediction, predict
from lit_lora.classify.run import (
    ClassifyConfig,
    LabeledData,
    apply_with_head,
    checkpoint_activations,
    load_labeled,
    plan_labeled,
    prediction_samples,
    save_result,
)
from lit_lora.classify.task import Task

__all__ = [
    "ClassifyConfig",
    "LabeledData",
    "OpenedClassifier",
    "Prediction",
    "Pretrained",
    "Task",
    "apply_with_head",
    "checkpoint_activations",
    "head_of",
    "is_encoder",
    "load_labeled",
    "load_with_head",
    "open_classifier",
    "plan_labeled",
    "predict",
    "prediction_samples",
    "read_pretrained",
    "save_result",
]
