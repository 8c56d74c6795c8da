"""Many ranks: who am I, sums over everybody, who holds what of the model, and what each writes to disk.

One process is the degenerate case, with no communication. With `optim/norms.py` the only code that touches
`torch.distributed`, whose DDP, FSDP2 and checkpoints do the work.
"""

from .ranks import (
    barrier,
    choose_device,
    finalize,
    initialize,
    is_chief,
    largest,
    let_first_rank_speak,
    of_chief,
    rank,
    sum_over_ranks,
    world_size,
)
from .replicas import Replicas, shard
from .storage import read_tensors, stored_tensors, write_tensors

__all__ = [
    "Replicas",
    "barrier",
    "choose_device",
    "finalize",
    "initialize",
    "is_chief",
    "largest",
    "let_first_rank_speak",
    "of_chief",
    "rank",
    "read_tensors",
    "shard",
    "stored_tensors",
    "sum_over_ranks",
    "world_size",
    "write_tensors",
]
