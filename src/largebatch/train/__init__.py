"""The training engine: any global batch, exact resume, one loop for every workload."""

from largebatch.train.engine import (
    DTYPES,
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
    "DTYPES",
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
