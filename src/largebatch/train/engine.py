"""The engine: a generator of optimizer steps over a sequence of stages.

It is handed the model, the optimizer, the stages, the batches and the loss, and knows nothing of what they compute.
One global step is

    totals <- what normalises the loss, summed over micro-batches and ranks
    for each micro-batch:  (loss / totals).backward()          gradients add up
    sum the gradients over ranks, once, beside the last of these backward passes
    clip by the global norm, step

so the result does not depend on how the global batch is cut into micro-batches and ranks, but for rounding.
"""

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from largebatch.optim import norms, optimizer_in_backward
from largebatch.optim.in_backward import InBackward
from largebatch.train import distributed
from largebatch.train.prefetch import prefetch
from largebatch.train.step_clock import StepClock

MicroBatch = dict[str, Tensor]
Loss = Callable[[nn.Module, MicroBatch, dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]


class TrainingDiverged(RuntimeError):
    """Too many steps in a row had a gradient that is not finite."""


@dataclass(frozen=True)
class GlobalBatch:
    """One optimizer step's data, this rank's part of it."""

    micro_batches: list[MicroBatch]
    totals: dict[str, int]  # this rank's counts that normalise the loss, by name
    num_sequences: int
    num_tokens: int  # real ones, without padding
    flops: float  # forward and backward, padding not counted
    cursor: dict[str, int]  # where the data continues after this batch


# What `autocast` says.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCALE_GROWS_AFTER = 2000

Batches = Callable[[int, Mapping[str, int] | None], Iterator[GlobalBatch]]


@dataclass(frozen=True)
class Stage:
    """A stretch of training with one batch size and one learning-rate schedule.

    Attributes:
        name: shown in metrics and reports.
        steps: number of optimizer steps.
        batch_size: samples in a global batch.
        learning_rate: step within the stage, from 0, to learning rate.
        keep_moments: whether the optimizer's moments live on from the stage before.
    """

    name: str
    steps: int
    batch_size: int
    learning_rate: Callable[[int], float]
    keep_moments: bool = True


@dataclass
class Progress:
    """Where training stands after the last finished step; with the weights, all that a resume needs."""

    step: int = 0
    stage: int = 0
    stage_step: int = 0
    samples: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    cursor: dict[str, int] | None = None
    loss_scale: float = 2.0**16  # with fp16: what the loss is multiplied by
    steps_at_scale: int = 0  # without a step skipped


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did; numbers are over the global batch."""

    step: int  # from 1, over all stages
    stage: Stage
    stage_step: int  # from 1
    learning_rate: float
    metrics: dict[str, float]  # "loss" and what the loss function reports
    grad_norm: float  # before clipping
    clipped: bool
    skipped: bool  # the gradient was not finite, and the weights were left alone (`in_backward`: those of its layers)
    loss_scale: float  # of this step; 1 but for fp16
    stop: bool  # some rank was asked to stop
    num_sequences: int
    num_tokens: int
    flops: float
    step_s: float
    data_s: float  # part of step_s spent waiting for the batch
    parts_s: dict[str, float] = field(default_factory=dict)  # step_s by `step_clock.PARTS`; empty without `breakdown`

    @property
    def ends_stage(self) -> bool:
        return self.stage_step == self.stage.steps


@dataclass
class Engine:
    """Trains `model` through `stages`; iterate over `run()` to make it go.

    Args:
        model: on the device it trains on, the same on every rank.
        optimizer: any `torch.optim.Optimizer` over parameters of the model, whose gradients are clipped together. The
            learning rate of every group is set to the stage's, times the group's `lr_scale` where it has one.
        stages: in order.
        batches: `batches(stage_index, cursor)` iterates over the global batches of a stage, from the cursor on.
        loss: `loss(model, micro_batch, totals)` gives this micro-batch's contribution to the global mean loss, and to
            each reported metric.
        max_grad_norm: gradients are scaled down to this global norm; None for no clipping.
        autocast: "fp32", or "bf16" or "fp16" for matrix products in that dtype with fp32 weights. With "fp16" the loss
            is scaled, as by `torch.amp.GradScaler`: half as much after a gradient that is not finite, and twice as much
            after `SCALE_GROWS_AFTER` steps without one.
        compression: "bf16" sums the gradients over the ranks in bfloat16.
        stop: asked once a step on every rank; one rank's yes is `StepResult.stop` on all.
        seed: with the step and the micro-batch the key of the dropout masks.
        in_backward: move each layer within the backward pass and free its gradient there; see `optimizer_in_backward`.
            Takes batches of one micro-batch and no `max_grad_norm`.
        breakdown: tell how long each part of a step took; on CUDA that costs waits for the device.
        max_skipped: give up after this many steps in a row whose gradient is not finite.
        progress: where to begin; changed in place, and consistent whenever `run()` has yielded.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    stages: Sequence[Stage]
    batches: Batches
    loss: Loss
    max_grad_norm: float | None = 1.0
    autocast: str = "fp32"
    compression: str = "none"
    stop: Callable[[], bool] = bool
    seed: int = 0
    in_backward: bool = False
    breakdown: bool = False
    max_skipped: int = 10
    progress: Progress = field(default_factory=Progress)
    _moves: InBackward | None = field(default=None, init=False, repr=False)

    def run(self) -> Iterator[StepResult]:
        """Yield after every optimizer step, from `progress` to the end of the last stage.

        Raises:
            TrainingDiverged: `max_skipped` steps in a row had a gradient that is not finite.
            ValueError: a setting out of range, a stage without steps, or one whose batches run out.
        """
        for stage in self.stages:
            if stage.steps < 1:
                raise ValueError(f"stages: {stage.name!r} has {stage.steps} steps, expected at least 1")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm={self.max_grad_norm}: expected a number above 0, or None for no clipping")
        if self.in_backward and self.max_grad_norm is not None:
            raise ValueError(f"max_grad_norm={self.max_grad_norm}: expected None with in_backward")
        if self.in_backward and self.autocast == "fp16":
            raise ValueError(
                "autocast='fp16': expected 'bf16' or 'fp32' with in_backward, which cannot take a scale back"
            )
        replicas = distributed.Replicas(self.model, self.compression)
        self._moves = optimizer_in_backward(self.optimizer, with_grad_norm=True) if self.in_backward else None
        try:
            yield from self._run(replicas)
        finally:
            if self._moves is not None:
                self._moves.remove()

    def _run(self, replicas: distributed.Replicas) -> Iterator[StepResult]:
        skipped_in_a_row = 0
        while self.progress.stage < len(self.stages):
            index, stage = self.progress.stage, self.stages[self.progress.stage]
            if self.progress.stage_step == 0 and not stage.keep_moments:
                self.optimizer.state.clear()
            batches = prefetch(self.batches(index, self.progress.cursor))
            try:
                while self.progress.stage == index:
                    result = self._step(stage, batches, replicas)
                    if not result.skipped:
                        skipped_in_a_row = 0
                    elif result.loss_scale <= 1:  # else a smaller scale may do
                        skipped_in_a_row += 1
                    if result.ends_stage:
                        self.progress.stage, self.progress.stage_step = index + 1, 0
                    yield result
                    if skipped_in_a_row >= self.max_skipped:
                        raise TrainingDiverged(
                            f"training diverged: the gradient was not finite in the {skipped_in_a_row} steps up to "
                            f"step {result.step} ({stage.name}, learning rate {result.learning_rate:.3g}); "
                            "use a lower learning rate or a longer warm-up"
                        )
            finally:
                batches.close()

    def probe(self, micro_batch: MicroBatch) -> None:
        """Run forward and backward on a micro-batch, and leave the model and the random state as they were.

        Gradients are let go of, also where memory runs out on the way.
        """
        device = next(self.model.parameters()).device
        totals: dict[str, Tensor] = collections.defaultdict(lambda: torch.ones((), device=device))
        buffers = [(x, x.clone()) for x in self.model.buffers()]  # of BatchNorm, which counts every forward pass
        self.model.train()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            try:
                with self._autocast(device):
                    loss, _ = self.loss(self.model, to_device(micro_batch, device), totals)
                loss.backward()  # type: ignore[no-untyped-call]
            finally:
                self._let_go_of_gradients()
                with torch.no_grad():
                    for x, before in buffers:
                        x.copy_(before)

    def _step(self, stage: Stage, batches: Iterator[GlobalBatch], replicas: distributed.Replicas) -> StepResult:
        device = next(self.model.parameters()).device
        clock = StepClock(device, self.breakdown)
        batch = next(batches, None)
        if batch is None:
            raise ValueError(
                f"batches: they end before step {self.progress.stage_step + 1} of {stage.steps} of {stage.name!r}"
            )
        data_s = clock.mark("data")

        if self.in_backward and len(batch.micro_batches) > 1:
            raise ValueError(
                f"in_backward: expected one micro-batch in a step, and there are {len(batch.micro_batches)}"
            )
        learning_rate = stage.learning_rate(self.progress.stage_step)
        set_learning_rate(self.optimizer, learning_rate)
        totals, (num_sequences, num_tokens, flops) = _global_counts(batch, device)
        self.model.train()
        self._let_go_of_gradients()
        scale = self.progress.loss_scale if self.autocast == "fp16" else 1.0
        sums: dict[str, Tensor] = {}
        for index, micro_batch in enumerate(batch.micro_batches):
            self._seed_dropout(index)
            with replicas.backward(last=index == len(batch.micro_batches) - 1):
                with self._autocast(device):
                    loss, metrics = self.loss(replicas.forward, to_device(micro_batch, device), totals)
                clock.mark("forward")
                (loss * (replicas.loss_scale * scale)).backward()
                clock.mark("backward")
            for name, value in {"loss": loss.detach(), **metrics}.items():
                sums[name] = sums[name] + value.float() if name in sums else value.float()
        moved = [x for group in self.optimizer.param_groups for x in group["params"]]
        grad_norm = global_grad_norm(moved) / scale if self._moves is None else self._moves.grad_norm()

        # One transfer, and so one wait for the device, tells everything about the step.
        stop = torch.tensor(float(self.stop()), device=device)
        stacked = distributed.sum_over_ranks(torch.stack([*(value.to(device) for value in sums.values()), stop]))
        *values, stops, norm = torch.cat([stacked, grad_norm.float().reshape(1)]).tolist()
        finite = norm < float("inf")  # false for NaN as well
        clipped = finite and self.max_grad_norm is not None and norm > self.max_grad_norm
        if clipped:
            _scale_gradients(moved, self.max_grad_norm / grad_norm / scale)
        elif scale != 1 and finite:
            _scale_gradients(moved, torch.tensor(1 / scale, device=device))
        clock.mark("reduction")
        if finite or self._moves is not None:
            self.optimizer.step()
        clock.mark("optimizer")

        progress = self.progress
        step_s = clock.total_s()
        progress.step += 1
        progress.stage_step += 1
        progress.samples += int(num_sequences)
        progress.tokens += int(num_tokens)
        progress.elapsed_s += step_s
        progress.cursor = dict(batch.cursor)
        if self.autocast == "fp16":
            _adjust_scale(progress, finite)
        return StepResult(
            step=progress.step,
            stage=stage,
            stage_step=progress.stage_step,
            learning_rate=learning_rate,
            metrics=dict(zip(sums, values, strict=True)),
            grad_norm=norm,
            clipped=clipped,
            skipped=not finite,
            loss_scale=scale,
            stop=stops > 0,
            num_sequences=int(num_sequences),
            num_tokens=int(num_tokens),
            flops=flops,
            step_s=step_s,
            data_s=data_s,
            parts_s=clock.parts_s,
        )

    def _let_go_of_gradients(self) -> None:
        """Of what the optimizer does not move too, which would pile up, and of what only it holds."""
        self.model.zero_grad(set_to_none=True)
        self.optimizer.zero_grad(set_to_none=True)

    def _autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        return nullcontext() if self.autocast == "fp32" else torch.autocast(device.type, DTYPES[self.autocast])

    def _seed_dropout(self, micro_batch: int) -> None:
        """Key the dropout masks by (seed, step, rank, micro-batch): a resumed run draws what the first would have."""
        key = (self.seed, self.progress.step, distributed.rank(), micro_batch)
        torch.manual_seed(_mix(*key))


def _adjust_scale(progress: Progress, finite: bool) -> None:
    """Choose the next step's scale of the loss."""
    progress.steps_at_scale = progress.steps_at_scale + 1 if finite else 0
    if not finite:
        progress.loss_scale /= 2
    elif progress.steps_at_scale == SCALE_GROWS_AFTER:
        progress.loss_scale, progress.steps_at_scale = 2 * progress.loss_scale, 0


def _mix(*keys: int) -> int:
    """A 63-bit hash of some counters: the finaliser of splitmix64 over each in turn."""
    state = 0
    for key in keys:
        state = (state + key + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


def _global_counts(batch: GlobalBatch, device: torch.device) -> tuple[dict[str, Tensor], list[float]]:
    """The normalisers of the loss, at least 1 each, and the sequences, tokens and FLOPs of the batch over all ranks."""
    counts = [*batch.totals.values(), batch.num_sequences, batch.num_tokens, batch.flops]
    summed = torch.tensor(counts, dtype=torch.float64)
    if distributed.world_size() > 1:
        summed = distributed.sum_over_ranks(summed.to(device)).cpu()
    totals = summed[: len(batch.totals)].clamp(min=1).float().to(device)
    return dict(zip(batch.totals, totals.unbind(), strict=True)), summed[len(batch.totals) :].tolist()


def to_device(micro_batch: MicroBatch, device: torch.device) -> MicroBatch:
    """The micro-batch on `device`; itself where it is there already."""
    if device.type == "cpu":
        return micro_batch
    return {
        name: x if x.device.type == device.type else x.pin_memory().to(device, non_blocking=True)
        for name, x in micro_batch.items()
    }


@torch.no_grad()
def global_grad_norm(parameters: Sequence[Tensor]) -> Tensor:
    """The l2 norm over all gradients, a 0-D tensor; over the whole of them, where they are cut over ranks.

    Gradients that are sums still to be taken over ranks are taken, in place.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    for parameter, gradient in zip(parameters, norms.gradients(parameters), strict=True):
        if gradient is not parameter.grad:
            parameter.grad = gradient
    return norms.global_norm(parameters)


@torch.no_grad()
def _scale_gradients(parameters: Sequence[Tensor], factor: Tensor) -> None:
    gradients = [norms.local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every parameter group this learning rate, times its own `lr_scale` where it has one."""
    for group in optimizer.param_groups:
        rate = learning_rate * group.get("lr_scale", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
