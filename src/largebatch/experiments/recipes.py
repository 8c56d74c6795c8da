"""The recipes: functions that return a frozen configuration. A variant calls another and changes a field or two."""

import dataclasses
import difflib
from collections.abc import Callable

from largebatch import scaling
from largebatch.errors import UserError
from largebatch.experiments.config import (
    BertChoice,
    ClassificationConfig,
    ImageData,
    OptimConfig,
    PretrainingConfig,
    RunConfig,
    SquadConfig,
    SquadData,
    StageConfig,
    TextData,
)

RECIPES: dict[str, Callable[[], RunConfig]] = {}


def recipe(name: str) -> Callable[[Callable[[], RunConfig]], Callable[[], RunConfig]]:
    """Register a function under the name that the command line knows it by."""

    def register(function: Callable[[], RunConfig]) -> Callable[[], RunConfig]:
        RECIPES[name] = function
        return function

    return register


def get(name: str) -> RunConfig:
    """The configuration of a recipe.

    Raises:
        UserError: there is none of that name; the nearest is named.
    """
    if name not in RECIPES:
        nearest = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.4)
        hint = f"; the nearest is {nearest[0]}" if nearest else ""
        raise UserError(f"there is no recipe {name}{hint} (largebatch train --list shows all)")
    return RECIPES[name]()


def _from_plan(plan: scaling.Plan) -> tuple[StageConfig, ...]:
    predictions = {128: 20, 512: 80}
    begins = [plan.rewarmup or index == 0 for index in range(len(plan.stages))]
    return tuple(
        StageConfig(
            name=stage.name,
            batch_size=stage.batch_size,
            steps=stage.steps,
            warmup_steps=stage.warmup_steps,
            learning_rate=stage.learning_rate if begins_curve else None,
            schedule=plan.curve if begins_curve else "continue",
            power=plan.power,
            sequence_length=stage.sequence_length,
            max_predictions=predictions.get(stage.sequence_length or 0),
        )
        for stage, begins_curve in zip(plan.stages, begins, strict=True)
    )


# BERT-large as in the paper.


@recipe("bert-large-76min")
def bert_large_76min() -> PretrainingConfig:
    """The paper's mixed-batch run, 65,536 then 32,768; the rates by the square-root rule, as the paper prints none."""
    return PretrainingConfig(
        recipe="bert-large-76min",
        model=BertChoice("large"),
        stages=_from_plan(scaling.plan("bert", (65536, 32768))),
        evaluate_every=500,
        checkpoint_every=100,
    )


@recipe("bert-large-76min-nvidia")
def bert_large_76min_nvidia() -> PretrainingConfig:
    """The same batches with the rates, warm-ups and power of NVIDIA's published run."""
    return dataclasses.replace(
        bert_large_76min(),
        recipe="bert-large-76min-nvidia",
        stages=_from_plan(scaling.plan("bert", (65536, 32768), recipe="nvidia")),
    )


def _bert_large_untuned(batch_size: int) -> Callable[[], PretrainingConfig]:
    def function() -> PretrainingConfig:
        return dataclasses.replace(
            bert_large_76min(),
            recipe=f"bert-large-{batch_size}",
            stages=_from_plan(scaling.plan("bert", batch_size)),
        )

    function.__doc__ = f"The paper's untuned run at batch {batch_size:,} (Table 4)."
    return function


for _batch_size in (512, 1024, 2048, 4096, 8192, 16384, 32768):
    recipe(f"bert-large-{_batch_size}")(_bert_large_untuned(_batch_size))


# BERTs for less: one GPU or a CPU.


def _small_bert(name: str, size: str, batches: tuple[int, int], steps: tuple[int, int], lr: float) -> PretrainingConfig:
    return PretrainingConfig(
        recipe=name,
        model=BertChoice(size),
        optim=OptimConfig(lr=lr),
        stages=(
            StageConfig("seq128", batches[0], steps[0], warmup_steps=steps[0] // 10, sequence_length=128),
            StageConfig("seq512", batches[1], steps[1], warmup_steps=steps[1] // 10, sequence_length=512),
        ),
        evaluate_every=500,
        checkpoint_every=250,
    )


@recipe("bert-tiny")
def bert_tiny() -> PretrainingConfig:
    """2 layers of 128: a first model of one's own text on a CPU, tens of minutes."""
    return _small_bert("bert-tiny", "tiny", (256, 64), (2700, 300), lr=8e-3)


@recipe("bert-mini")
def bert_mini() -> PretrainingConfig:
    """4 layers of 256: hours on a CPU, minutes on a GPU."""
    return _small_bert("bert-mini", "mini", (1024, 256), (4500, 500), lr=5e-3)


@recipe("bert-base-32k")
def bert_base_32k() -> PretrainingConfig:
    """BERT-base with the paper's untuned 32,768 settings."""
    return dataclasses.replace(
        bert_large_76min(),
        recipe="bert-base-32k",
        model=BertChoice("base"),
        stages=_from_plan(scaling.plan("bert", 32768)),
    )


@recipe("bert-demo")
def bert_demo() -> PretrainingConfig:
    """What `largebatch demo` pre-trains: both stages in about three minutes on two cores."""
    return PretrainingConfig(
        recipe="bert-demo",
        model=BertChoice("tiny", hidden_dropout=0.0, attention_dropout=0.0),
        optim=OptimConfig(lr=1e-2),
        stages=(
            StageConfig("seq64", 128, 700, warmup_steps=70, sequence_length=64, micro_batch_size=128),
            StageConfig("seq128", 32, 100, warmup_steps=10, sequence_length=128, micro_batch_size=32),
        ),
        data=TextData(evaluation_sequences=1024),
        evaluate_every=100,
        checkpoint_every=200,
        trust_ratios_every=25,
    )


# Fine-tuning.


@recipe("squad")
def squad() -> SquadConfig:
    """SQuAD v1.1 as in Devlin et al.: AdamW, batch 32, 2 epochs of the official training set."""
    return SquadConfig(
        recipe="squad",
        optim=OptimConfig(name="adamw", lr=3e-5, weight_decay=0.01),
        stages=(StageConfig("squad", 32, 0, warmup_steps=None, schedule="triangle"),),
    )


@recipe("squad-demo")
def squad_demo() -> SquadConfig:
    """What `largebatch demo` fine-tunes: a small encoder on a handful of articles."""
    return SquadConfig(
        recipe="squad-demo",
        epochs=3.0,
        optim=OptimConfig(name="adamw", lr=1e-3),
        stages=(StageConfig("squad", 32, 0, warmup_steps=None, schedule="triangle", micro_batch_size=16),),
        data=SquadData(max_sequence_length=128, document_stride=64, max_query_length=32, unanswered_windows=False),
        trust_ratios_every=0,
    )


# Vision.


@recipe("lenet-mnist")
def lenet_mnist() -> ClassificationConfig:
    """LeNet on MNIST, batch 1,024, 30 epochs: the first author's settings with Algorithm 2's bias correction."""
    return ClassificationConfig(
        recipe="lenet-mnist",
        data=ImageData(dataset="mnist"),
        optim=OptimConfig(name="lamb", lr=4e-3),
        stages=(StageConfig("mnist", 1024, 1758, warmup_steps=59, power=0.5),),
        evaluate_every=293,  # 5 epochs
        checkpoint_every=586,
        trust_ratios_every=59,
    )
