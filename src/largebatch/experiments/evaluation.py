"""Evaluate what has been trained: a run on its held-out data, a model on a SQuAD file, a file of predictions."""

from pathlib import Path
from typing import Any

from largebatch.errors import UserError
from largebatch.evaluate import answer_questions, read_predictions, read_squad, squad_features, squad_score
from largebatch.experiments.config import SquadConfig, SquadData, override
from largebatch.experiments.runner import build_workload, check_same_data, config_of
from largebatch.experiments.squad import check_words, windows
from largebatch.experiments.transfer import open_encoder, run_weights
from largebatch.models import BertForQuestionAnswering
from largebatch.train import distributed
from largebatch.train.metrics import read_json


def evaluate_run(run: Path, data: Path | None = None) -> dict[str, Any]:
    """The newest checkpoint of a run on its held-out data, by the last stage's measure; `data`: where they lie now."""
    if "kind" not in read_json(run / "config.json"):
        raise UserError(f"{run} is a model in Hugging Face's format, not a run; name a file of questions with --squad")
    config = config_of(run)
    if data is not None:
        if isinstance(config, SquadConfig):
            raise UserError(f"{run} answers questions; name a file of them with --squad in place of --data")
        config = override(config, [f"data.path={data}"])
    workload = build_workload(config)
    check_same_data(run, workload)
    model = workload.model()
    model.load_state_dict(run_weights(run))
    model.to(distributed.choose_device(config.device))
    return workload.evaluate(model, len(config.stages) - 1, None)


def answer_file(model_path: Path, squad_file: Path) -> dict[str, Any]:
    """A question-answering model, of ours or in Hugging Face's format, on a SQuAD file; a run's in its own windows."""
    encoder = open_encoder(model_path)
    model = BertForQuestionAnswering(encoder.config)
    fresh = encoder.load_into(model)
    if fresh:
        raise UserError(
            f"{model_path} answers no questions (it has no {fresh[0]}); fine-tune it with `largebatch finetune squad`"
        )
    model.to(distributed.choose_device("auto"))
    config = config_of(model_path) if encoder.is_run else None
    data = config.data if isinstance(config, SquadConfig) else SquadData()
    dataset = read_squad(squad_file, on_bad_answer="skip")
    features = squad_features(dataset.examples, encoder.tokenizer(), **windows(data, encoder.config))
    check_words(features, encoder.config, model_path)
    return {"split": squad_file.name, **squad_score(dataset, answer_questions(model, features)).metrics()}


def score_file(squad_file: Path, predictions: Path) -> dict[str, Any]:
    """A file of predictions, id to text, by SQuAD's official measures."""
    score = squad_score(read_squad(squad_file, on_bad_answer="skip"), read_predictions(predictions))
    figures = {"split": squad_file.name, **score.metrics(), "questions": score.num_questions}
    return {**figures, "missing": score.num_missing, "unknown": score.num_unknown}
