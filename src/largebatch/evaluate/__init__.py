"""Evaluation: SQuAD, classification, masked words and next sentences."""

from largebatch.evaluate.classification import evaluate_classification
from largebatch.evaluate.finetune import FinetuneSettings, squad_batches
from largebatch.evaluate.pretraining import evaluate_pretraining
from largebatch.evaluate.squad import answer_questions, evaluate_squad, predict
from largebatch.evaluate.squad_data import Answer, SquadDataset, SquadExample, read_squad
from largebatch.evaluate.squad_features import SquadFeatures, squad_features
from largebatch.evaluate.squad_metrics import (
    SquadScore,
    answer_scores,
    normalize_answer,
    read_predictions,
    squad_score,
    write_predictions,
)
from largebatch.evaluate.squad_spans import RankedAnswer, best_answers, n_best_spans, rank_answers, ranked_to_json

__all__ = [
    "Answer",
    "FinetuneSettings",
    "RankedAnswer",
    "SquadDataset",
    "SquadExample",
    "SquadFeatures",
    "SquadScore",
    "answer_questions",
    "answer_scores",
    "best_answers",
    "evaluate_classification",
    "evaluate_pretraining",
    "evaluate_squad",
    "n_best_spans",
    "normalize_answer",
    "predict",
    "rank_answers",
    "ranked_to_json",
    "read_predictions",
    "read_squad",
    "squad_batches",
    "squad_features",
    "squad_score",
    "write_predictions",
]
