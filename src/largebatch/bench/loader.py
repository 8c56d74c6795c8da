"""Instances per second, and what it costs a training loop that they are made beside it."""

import dataclasses
import queue
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from largebatch import LAMB, param_groups
from largebatch.data import Corpus, PretrainingInstances, epoch_order
from largebatch.data.reference_instances import reference_epoch
from largebatch.experiments import recipes
from largebatch.experiments.config import BertChoice, PretrainingConfig, StageConfig, TextData
from largebatch.experiments.pretraining import PretrainingWorkload
from largebatch.train import Engine, GlobalBatch, Stage

# Steps in a row with the loader, then as many without.
_TURN = 10


def cpu_seconds(function: Callable[[], object]) -> float:
    """CPU time of this process, all its threads together: steadier than wall time where cores are shared."""
    start = time.process_time()
    function()
    return time.process_time() - start


def bench_instances(corpus: Corpus, length: int, whole_words: bool, repeats: int) -> dict[str, Any]:
    """Instances per second of one core, beside a reference that makes them token by token."""
    split = corpus.split("train")
    instances = PretrainingInstances(split, length, seed=0, whole_word_masking=whole_words)
    table_s = cpu_seconds(lambda: instances.num_instances(0))
    indices = epoch_order(0, 0, instances.num_instances(0), 0, min(8192, instances.num_instances(0)))
    instances.batch(0, indices[:512])
    rate = len(indices) / statistics.median(cpu_seconds(lambda: instances.batch(0, indices)) for _ in range(repeats))
    documents = [[sentence.tolist() for sentence in split.document(index)] for index in range(min(20, len(split)))]
    start = time.process_time()
    made = len(
        reference_epoch(
            documents,
            split.vocabulary,
            length,
            seed=0,
            epoch=0,
            max_predictions=instances.max_predictions,
            whole_word_masking=whole_words,
        )
    )
    reference = made / (time.process_time() - start)
    return {
        "benchmark": "instances, one core",
        "name": f"length {length}{', whole words' if whole_words else ''}",
        "table_s": table_s,
        "per_s": rate,
        "reference_per_s": reference,
        "ratio": rate / reference,
    }


def bench_loader(corpus: Path, size: str, *, steps: int = 100, batch_size: int = 32) -> dict[str, Any]:
    """Train a BERT on all cores with the loader beside it, and in turns on the same batches once they are made.

    The loader is the one of `largebatch train`: a thread that shuffles, makes the instances and turns them into
    tensors, two batches ahead.

    Args:
        corpus: a prepared corpus.
        size: of the BERT, as "tiny".
        steps: with the loader, and as many without.
        batch_size: sequences of length 128 in a step, one micro-batch. The share hardly depends on it.

    Returns:
        A row: instances per CPU second of the loader's thread; the wait for a batch, that thread's CPU time and all
        that the loader costs the step (wait and contention, the median over pairs of steps), each as a share of the
        step's time.
    """
    workload = _workload(corpus, size, steps, batch_size)
    model = workload.model()
    optimizer = LAMB(param_groups(model), lr=1e-3)
    turn = threading.Event()
    turn.set()
    cpu_s: list[float] = []
    made: queue.SimpleQueue[GlobalBatch | None] = queue.SimpleQueue()

    def loader(stage: int, cursor: Mapping[str, int] | None) -> Iterator[GlobalBatch]:
        batches = workload.batches(stage, cursor)
        while True:
            turn.wait()
            start = time.thread_time()
            batch = next(batches)
            cpu_s.append(time.thread_time() - start)
            made.put(batch)
            yield batch

    def beforehand(stage: int, cursor: Mapping[str, int] | None) -> Iterator[GlobalBatch]:
        while (batch := made.get()) is not None:
            yield batch

    stages = [Stage("seq128", steps + 2 * _TURN, batch_size, lambda step: 1e-3)]
    with_loader = Engine(model, optimizer, stages, loader, workload.loss).run()
    without = Engine(model, optimizer, stages, beforehand, workload.loss).run()
    waits: list[float] = []
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for number in range(-_TURN, steps, _TURN):  # the first turn warms up
        if number == 0:
            cpu_s.clear()
        for loading, run in ((True, with_loader), (False, without)):
            if loading:
                turn.set()
            else:
                turn.clear()
            for _ in range(_TURN):
                result = next(run)
                if number >= 0:
                    seconds[loading].append(result.step_s)
                    waits += [result.data_s] if loading else []
    turn.set()  # a thread that waits could not stop
    made.put(None)
    with_loader.close()
    without.close()
    step_s = statistics.median(seconds[True])
    per_batch_s = statistics.fmean(cpu_s)  # some batches are made together with others
    return {
        "benchmark": "loader beside training",
        "name": f"bert-{size}",
        "steps": steps,
        "batch_size": batch_size,
        "vocabulary": workload.corpus.vocab_size,
        "step_ms": 1e3 * step_s,
        "instances_per_cpu_s": batch_size / per_batch_s,
        "wait_share": sum(waits) / sum(seconds[True]),
        "cpu_share": per_batch_s / step_s,
        "cost_share": statistics.median(a / b for a, b in zip(seconds[True], seconds[False], strict=True)) - 1,
    }


def _workload(corpus: Path, size: str, steps: int, batch_size: int) -> PretrainingWorkload:
    config = recipes.get("bert-tiny")
    assert isinstance(config, PretrainingConfig)
    stage = StageConfig("seq128", batch_size, steps, sequence_length=128, micro_batch_size=batch_size)
    return PretrainingWorkload(
        dataclasses.replace(
            config,
            model=BertChoice(size),
            data=TextData(path=str(corpus)),
            stages=(stage,),
            dropout_masks="keyed",
        )
    )
