"""Models and their losses: BERT on real tokens only, and the vision networks of the LAMB paper."""

from .bert import (
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
)
from .config import BertConfig
from .losses import classification_loss, pretraining_loss, question_answering_loss

__all__ = [
    "BertConfig",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertModel",
    "classification_loss",
    "pretraining_loss",
    "question_answering_loss",
]
