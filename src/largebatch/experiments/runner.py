"""From a configuration to a run directory: train, evaluate, checkpoint, resume."""

import dataclasses
import errno
import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from largebatch.errors import UserError
from largebatch.experiments.config import (
    ClassificationConfig,
    PretrainingConfig,
    RunConfig,
    SquadConfig,
    from_json,
    to_json,
)
from largebatch.experiments.optimizers import build_optimizer
from largebatch.experiments.stages import build_stages, check_micro_batch, peak_rate, with_warm_ups
from largebatch.experiments.workload import Workload
from largebatch.models import compile_elementwise
from largebatch.train import (
    DTYPES,
    Engine,
    Stage,
    StepResult,
    TrainingDiverged,
    allocator,
    checkpoint,
    distributed,
    hardware,
    threads,
)
from largebatch.train.metrics import RunDirectory, read_json
from largebatch.train.micro_batch import divisors, find_micro_batch

# What a run shows while it goes: called with each step and the run's total number of steps, and with each event.
OnStep = Callable[[StepResult, int], None]
OnEvent = Callable[[str], None]


# Settings that do not change what is computed, and so may differ when a run is resumed. So may the micro-batches.
ELASTIC = (
    *("device", "sharding", "optimizer_in_backward", "cpu_offload"),
    *("timeout_s", "checkpoint_every", "keep_checkpoints"),
)
# Nor do these, as long as the same data lie there.
PLACES = ("data.path", "data.train", "data.test")


class Interrupted(Exception):
    """The run was asked to stop, and has written a checkpoint."""


def run(
    config: RunConfig,
    out: Path,
    *,
    resume: bool = False,
    on_step: OnStep = lambda result, total: None,
    on_event: OnEvent = lambda line: None,
) -> dict[str, Any]:
    """Train what `config` describes into the run directory `out`, and evaluate it.

    Args:
        config: the run. Of one that is resumed the directory's own `config.json` is in force, but for the `ELASTIC`
            settings and, where they are not None or empty, the micro-batch sizes and the `PLACES` of the data.
        out: the run directory; must be new, unless `resume`.
        resume: go on from the newest checkpoint in `out`, with the same bits as if the run had never stopped.
        on_step: called after each optimizer step.
        on_event: called with a line of text for what else happens.

    Returns:
        The content of `summary.json`.

    Raises:
        UserError: settings, data or checkpoint are not right; nothing is left behind then.
        Interrupted: on SIGINT or SIGTERM, after a checkpoint has been written.
        TrainingDiverged: the gradient stayed infinite or NaN.
    """
    settings = allocator.keep_freed_memory()
    device = distributed.initialize(config.device, config.timeout_s)
    try:
        started = _has_begun(out, resume)
        if started and distributed.of_chief((out / "summary.json").exists()):
            on_event(f"{out} is complete")
            return read_json(out / "summary.json")
        if started:
            config = _fit_to_ranks(_changed(config_of(out), config))
        return _run(config, out, started, device, settings, on_step, on_event)
    finally:
        distributed.finalize()


def _run(
    config: RunConfig, out: Path, started: bool, device: torch.device, settings: str, on_step: OnStep, on_event: OnEvent
) -> dict[str, Any]:
    config, workload, engine = prepare_engine(config, device, on_event)
    if started:
        check_same_data(out, workload)
    model, optimizer = engine.model, engine.optimizer
    chief = distributed.rank() == 0
    directory = RunDirectory(out, write=chief)
    try:
        if not distributed.of_chief(directory.lock()):
            raise UserError(f"{out} is being trained by another process; wait for it, or name another with --out")
        if not started:
            _has_begun(out, resume=False)  # in the meantime
        found = checkpoint.latest(directory.checkpoints) if started else None
        if found is not None:
            engine.progress = checkpoint.load(found, model, optimizer)
            on_event(f"resuming {out} after step {engine.progress.step}")
        if config.tensorboard:
            directory.use_tensorboard(engine.progress.step)
        directory.rewind(engine.progress.step)
        directory.write_json("config.json", {**to_json(config), "details": workload.details})
        directory.write_json("env.json", {**hardware.describe(device, settings), "waiting": threads.describe()})
        if directory.write:
            workload.save_assets(out)
        if found is not None:
            directory.log("resume", step=engine.progress.step)
        return _train(config, workload, engine, directory, on_step, on_event)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{out} cannot be written ({error.strerror or error}); make room, and go on with --resume"
        ) from None
    finally:
        directory.close()


def _has_begun(out: Path, resume: bool) -> bool:
    """Whether `out` holds a run, which is refused unless it is to be resumed."""
    begun = distributed.of_chief((out / "config.json").exists())  # others may come when the chief has written it
    if begun and not resume:
        raise UserError(f"{out} holds a run already; resume it with --resume or name another folder with --out")
    return begun


def prepare_engine(
    config: RunConfig, device: torch.device, on_event: OnEvent, only: int | None = None
) -> tuple[RunConfig, Workload, Engine]:
    """Make all that a run needs to begin: the configuration with nothing left to find out, its workload, its engine.

    Args:
        config, device, on_event: of the run.
        only: the stage that is to be run, None for all; the others' micro-batches are not looked for.

    Raises:
        UserError: settings or data are not right.
    """
    config = dataclasses.replace(
        config,
        precision=_precision(config.precision, device),
        dropout_masks=_dropout_masks(config.dropout_masks, device),
    )
    _check_ranges(config)
    _check_in_backward(config)
    workload = build_workload(config)
    config = with_warm_ups(workload.config)
    torch.manual_seed(config.seed)
    model = workload.model().to(device)
    if config.compile:
        compile_elementwise(model)
    distributed.shard(model, config.sharding, config.gradient_compression)
    optimizer = build_optimizer(config.optim, model, config.cpu_offload)
    stages = build_stages(config)
    engine = Engine(
        model,
        optimizer,
        stages,
        workload.batches,
        workload.loss,
        max_grad_norm=config.max_grad_norm,
        autocast=config.precision,
        compression=config.gradient_compression,
        seed=config.seed,
        in_backward=config.optimizer_in_backward,
        breakdown=device.type == "cpu",  # where it costs nothing
    )
    config = _with_micro_batches(config, workload, engine, device, on_event, only)
    return config, workload, engine


def _train(
    config: RunConfig,
    workload: Workload,
    engine: Engine,
    directory: RunDirectory,
    on_step: OnStep,
    on_event: OnEvent,
) -> dict[str, Any]:
    device = next(engine.model.parameters()).device
    dtype = DTYPES[config.precision]
    peak_flops_per_s = hardware.matmul_flops_per_s(device, dtype) * distributed.world_size()
    num_steps = sum(stage.steps for stage in engine.stages)
    evaluation: dict[str, Any] = {}

    def save() -> None:
        checkpoint.save(
            directory.checkpoints, engine.model, engine.optimizer, engine.progress, keep=config.keep_checkpoints
        )

    with _stop_signals() as engine.stop:
        for result in engine.run():
            stage = _stage_index(engine.stages, result.stage)
            if result.stage_step == 1:
                directory.log("stage", step=result.step, stage=result.stage.name, batch_size=result.stage.batch_size)
            directory.log("step", **_step_line(result, engine, peak_flops_per_s))
            if config.trust_ratios_every and (result.step % config.trust_ratios_every == 0 or result.step == 1):
                _log_trust_ratios(result, engine, directory)
            on_step(result, num_steps)
            # Many ranks stop where they have agreed to: a signal does not reach them all in the same step.
            stop = result.stop if distributed.world_size() > 1 else engine.stop()
            if result.ends_stage or (config.evaluate_every and result.step % config.evaluate_every == 0):
                evaluation = workload.evaluate(engine.model, stage, directory.path if directory.write else None)
                directory.log("eval", step=result.step, stage=result.stage.name, **evaluation)
                on_event(f"{result.stage.name} step {result.stage_step}: " + describe_evaluation(evaluation))
            due = config.checkpoint_every and result.step % config.checkpoint_every == 0
            if due or result.ends_stage or stop:
                save()
            if stop and result.step < num_steps:
                raise Interrupted(f"stopped after step {result.step}; go on with --resume --out {directory.path}")

    if not evaluation:  # the run had been stopped between its last step and its summary
        evaluation = workload.evaluate(
            engine.model, len(engine.stages) - 1, directory.path if directory.write else None
        )
    summary = {
        "recipe": config.recipe,
        "kind": config.kind,
        "status": "complete",
        "steps": engine.progress.step,
        "samples": engine.progress.samples,
        "tokens": engine.progress.tokens,
        "wall_s": round(engine.progress.elapsed_s, 3),
        "parameters": sum(parameter.numel() for parameter in engine.model.parameters()),
        "peak_flops_per_s": peak_flops_per_s,
        "evaluation": evaluation,
        "baselines": workload.baselines,
        "notes": workload.notes,
    }
    directory.write_json("summary.json", summary)
    distributed.barrier()
    return summary


def config_of(run_directory: Path) -> RunConfig:
    """The configuration that a run directory was made with, micro-batches and precision resolved."""
    content = read_json(run_directory / "config.json")
    content.pop("details", None)
    return from_json(content)


def check_same_data(run_directory: Path, workload: Workload) -> None:
    """Refuse data that are not those of the run, as far as its details tell.

    Raises:
        UserError: they are others.
    """
    saved = read_json(run_directory / "config.json").get("details", {})
    now = json.loads(json.dumps(workload.details))
    for name in saved.keys() & now.keys():
        if saved[name] != now[name]:
            raise UserError(
                f"the data of {run_directory} have changed since it began ({name} was {_short(saved[name])} and is "
                f"{_short(now[name])}): put them back, or begin a new run"
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 20 else f"{text[:20]}..."


def _changed(saved: RunConfig, asked: RunConfig) -> RunConfig:
    """The saved configuration with the settings of the other that may change when a run is resumed.

    Raises:
        UserError: a micro-batch that does not divide its batch, on however few ranks.
    """
    stages = []
    for index, (stage, other) in enumerate(zip(saved.stages, asked.stages, strict=True)):
        if other.micro_batch_size is not None:
            stage = dataclasses.replace(stage, micro_batch_size=other.micro_batch_size)
            check_micro_batch(stage, stage.batch_size, f"stages.{index}")
        stages.append(stage)
    names = [name for place in PLACES if hasattr(saved.data, name := place.removeprefix("data."))]
    places = {name: getattr(asked.data, name) or getattr(saved.data, name) for name in names}
    data = dataclasses.replace(saved.data, **places)
    elastic = {name: getattr(asked, name) for name in ELASTIC}
    return dataclasses.replace(saved, stages=tuple(stages), data=data, **elastic)


def _fit_to_ranks(config: RunConfig) -> RunConfig:
    """Give the ranks of a resumed run micro-batches that they can cut their shares into, no larger if it can be."""
    stages = []
    for stage in config.stages:
        share, size = stage.batch_size // distributed.world_size(), stage.micro_batch_size
        if config.optimizer_in_backward:  # which takes the whole share at once
            size = share
        elif size is not None and share % size:
            size = max(smaller for smaller in divisors(share) if smaller < size)
        stages.append(dataclasses.replace(stage, micro_batch_size=size))
    return dataclasses.replace(config, stages=tuple(stages))


def build_workload(config: RunConfig) -> Workload:
    """The workload of a configuration's kind; reads its data."""
    if isinstance(config, PretrainingConfig):
        from largebatch.experiments.pretraining import PretrainingWorkload

        return PretrainingWorkload(config)
    if isinstance(config, ClassificationConfig):
        from largebatch.experiments.classification import ClassificationWorkload

        return ClassificationWorkload(config)
    assert isinstance(config, SquadConfig)
    from largebatch.experiments.squad import SquadWorkload

    return SquadWorkload(config)


def describe_evaluation(evaluation: dict[str, Any]) -> str:
    """An evaluation in one line of text."""
    numbers = [f"{name} {value:.4g}" for name, value in figures_of(evaluation).items()]
    return f"{evaluation.get('split', 'evaluation')}: " + ", ".join(numbers)


def figures_of(evaluation: dict[str, Any]) -> dict[str, float]:
    """An evaluation without its counts and its split."""
    counts = ("masked_tokens", "sequences", "samples")
    return {name: v for name, v in evaluation.items() if isinstance(v, float) and name not in counts}


def _check_ranges(config: RunConfig) -> None:
    """Refuse numbers that would do something else than they seem to say."""
    for name in ("evaluate_every", "checkpoint_every", "trust_ratios_every"):
        if getattr(config, name) < 0:
            raise UserError(f"{name} is {getattr(config, name)}; it must be a number of steps, or 0")
    if not -(2**63) <= config.seed < 2**64:
        raise UserError(f"seed is {config.seed}; it must fit into 64 bits: -2^63 to 2^64 - 1")
    if config.keep_checkpoints is not None and config.keep_checkpoints < 1:
        raise UserError(f"keep_checkpoints is {config.keep_checkpoints}; it must be at least 1, or none to keep all")
    if config.max_grad_norm is not None and not config.max_grad_norm > 0:
        raise UserError(f"max_grad_norm is {config.max_grad_norm}; it must be above 0, or none not to clip")


def _check_in_backward(config: RunConfig) -> None:
    """Refuse what an optimizer in the backward pass cannot go with."""
    if not config.optimizer_in_backward:
        return
    if config.max_grad_norm is not None:
        raise UserError(
            "optimizer_in_backward moves layers before the norm of all gradients is known: set max_grad_norm=none"
        )
    if config.precision == "fp16":
        raise UserError(
            "optimizer_in_backward moves layers before a scaled loss is known to be finite: use bf16 or fp32"
        )
    if config.cpu_offload:
        raise UserError("optimizer_in_backward and cpu_offload cannot go together: set one of them to false")
    if config.optim.name in ("adamw", "sgd"):
        raise UserError(
            f"optimizer_in_backward cannot skip a step whose gradient is not finite, which {config.optim.name} needs"
        )
    if config.sharding == "ddp" and distributed.world_size() > 1:
        raise UserError(
            "optimizer_in_backward on many ranks needs sharding=fsdp or hsdp: DDP holds all gradients in its buckets"
        )
    for index, stage in enumerate(config.stages):
        share = stage.batch_size // distributed.world_size()
        if stage.micro_batch_size not in (None, share):
            raise UserError(
                f"optimizer_in_backward cannot accumulate: set stages.{index}.micro_batch_size={share}, the whole batch"
                " of a rank, or train without it"
            )


def _with_micro_batches(
    config: RunConfig, workload: Workload, engine: Engine, device: torch.device, on_event: OnEvent, only: int | None
) -> RunConfig:
    """Fill in the micro-batch of every stage that has none, by a probe that leaves the model as it was."""
    stages = list(config.stages)
    wanted = range(len(stages)) if only is None else [only]
    for index in wanted:
        stage = stages[index]
        size = stage.micro_batch_size
        if size is None and config.optimizer_in_backward:
            size = stage.batch_size // distributed.world_size()
        if size is None:
            size = find_micro_batch(
                lambda size, index=index: engine.probe(workload.probe_batch(index, size)),
                stage.batch_size // distributed.world_size(),
                device,
                # Two moments in float32, and about as much again that a step needs for a moment.
                reserve_bytes=16 * sum(parameter.numel() for parameter in engine.model.parameters()),
                agree=lambda value: distributed.largest(value, device),
            )
            on_event(f"{stage.name}: micro-batch {size} of {stage.batch_size}, found by a probe")
        workload.micro_batch_sizes[index] = size
        stages[index] = dataclasses.replace(stage, micro_batch_size=size)
    config = dataclasses.replace(config, stages=tuple(stages))
    if isinstance(config, PretrainingConfig) and config.sharding == "ddp" and not config.cpu_offload:
        for index in wanted:
            on_event(f"{stages[index].name}: memory of a step, estimated: {workload.memory(index, device)}")
    return config


def _precision(precision: str, device: torch.device) -> str:
    if precision not in ("auto", *DTYPES):
        raise UserError(f"precision is {precision!r}; it must be auto, fp32, bf16 or fp16")
    if precision == "auto":
        return "bf16" if hardware.bf16_is_fast(device) else "fp32"
    return precision


def _dropout_masks(masks: str, device: torch.device) -> str:
    if masks not in ("auto", "keyed", "torch"):
        raise UserError(f"dropout_masks is {masks!r}; it must be auto, keyed or torch")
    if masks == "auto":  # on CUDA keyed masks keep attention from its fused kernels
        return "keyed" if device.type == "cpu" else "torch"
    return masks


def _stage_index(stages: list[Stage], stage: Stage) -> int:
    return next(index for index, candidate in enumerate(stages) if candidate is stage)


def _step_line(result: StepResult, engine: Engine, peak_flops_per_s: float) -> dict[str, Any]:
    return {
        "step": result.step,
        "stage": result.stage.name,
        "stage_step": result.stage_step,
        "samples": engine.progress.samples,
        "lr": result.learning_rate,
        **result.metrics,
        "grad_norm": result.grad_norm,
        "clipped": result.clipped,
        "skipped": result.skipped,
        **({"loss_scale": result.loss_scale} if engine.autocast == "fp16" else {}),
        "tokens_per_s": result.num_tokens / result.step_s,
        "sequences_per_s": result.num_sequences / result.step_s,
        "flops_per_s": result.flops / result.step_s,
        "mfu": result.flops / result.step_s / peak_flops_per_s,
        "data_s": result.data_s,
        **{f"{part}_s": seconds for part, seconds in result.parts_s.items()},
        "time_s": engine.progress.elapsed_s,
    }


def _log_trust_ratios(result: StepResult, engine: Engine, directory: RunDirectory) -> None:
    ratios = engine.optimizer.trust_ratios() if hasattr(engine.optimizer, "trust_ratios") else {}
    if result.skipped or not ratios:
        return
    values = torch.stack([ratio.float() for ratio in ratios.values()]).tolist()
    adapted = {name for group in engine.optimizer.param_groups if group.get("adapt") for name in group["param_names"]}
    named = {name: value for name, value in zip(ratios, values, strict=True) if name in adapted}
    directory.log("trust_ratios", step=result.step, stage=result.stage.name, ratios=named)


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """While it lasts, SIGINT and SIGTERM only take note, so that the step under way is finished; a second one kills."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    previous: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, note)
    except ValueError:  # not the main thread: signals stay with whoever runs it
        pass
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


__all__ = ["Interrupted", "TrainingDiverged", "build_stages", "build_workload", "config_of", "peak_rate", "run"]
