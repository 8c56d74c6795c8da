"""The training engine: any global batch, exact resume, one loop for every workload."""

from largebatch.train.engine import (
    Batches,
    Engine,
    GlobalBatch,
    Loss,
    MicroBatch,
    Progress,
    Stage,
    StepResult,
    TrainingDiverged,
)

__all__ = [
    "Batches",
    "Engine",
    "GlobalBatch",
    "Loss",
    "MicroBatch",
    "Progress",
    "Stage",
    "StepResult",
    "TrainingDiverged",
]
