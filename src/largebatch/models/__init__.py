"""Models and their losses: BERT on real tokens only, and the vision networks of the LAMB paper."""

from .bert import BertModel
from .config import BertConfig
from .flops import training_flops
from .fusion import compile_elementwise
from .heads import BertForPreTraining, BertForQuestionAnswering, BertForSequenceClassification
from .losses import classification_loss, pretraining_loss, question_answering_loss
from .memory import MemoryEstimate, training_memory
from .pretrained import load_pretrained, load_weights, save_pretrained

__all__ = [
    "BertConfig",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertModel",
    "MemoryEstimate",
    "classification_loss",
    "compile_elementwise",
    "load_pretrained",
    "load_weights",
    "pretraining_loss",
    "question_answering_loss",
    "save_pretrained",
    "training_flops",
    "training_memory",
]
