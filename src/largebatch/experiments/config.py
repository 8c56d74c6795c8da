"""A run as data: frozen dataclasses, their JSON form, and typed overrides from the command line."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from largebatch.errors import UserError

C = TypeVar("C")


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer. `lr` is the peak rate of the first stage; a stage without a rate of its own scales it."""

    name: str = "lamb"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    momentum: float = 0.9
    weight_decay: float = 0.01
    bias_correction: bool = True
    trust_coefficient: float = 1.0
    norm: str = "l2"
    exclude: tuple[str, ...] = ("bias", "LayerNorm", "norm")
    backend: str = "auto"


@dataclass(frozen=True)
class StageConfig:
    """A stage: its data's length, its batch, and its learning-rate schedule."""

    name: str
    batch_size: int
    steps: int
    warmup_steps: int | None = 0  # None: a tenth of the steps
    learning_rate: float | None = None  # None: optim.lr, scaled by the square root of the batch ratio to stage 1
    schedule: str = "polynomial"  # or triangle, constant; continue: go on with the curve of the stage before
    power: float = 1.0
    sequence_length: int | None = None
    max_predictions: int | None = None
    micro_batch_size: int | None = None  # sequences of full length at a time; None: found by a probe
    keep_moments: bool = True


@dataclass(frozen=True)
class RunConfig:
    """What every run has; the kinds of run add their model and data."""

    kind: ClassVar[str]

    recipe: str
    stages: tuple[StageConfig, ...]
    optim: OptimConfig = field(default_factory=OptimConfig)
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    compile: bool = False  # fuse BERT's element-wise work by torch.compile; made for CUDA
    dropout_masks: str = "auto"  # keyed: by sample and epoch, so alike on any ranks; torch: by its generator, by step
    sharding: str = "ddp"  # or fsdp, hsdp: who holds what of the model on many ranks
    gradient_compression: str = "none"  # or bf16
    timeout_s: float = 600  # of a collective: ranks that wait longer for another one give up
    optimizer_in_backward: bool = False  # move each layer within the backward pass, and hold no set of gradients
    cpu_offload: bool = False  # the optimizer's state and arithmetic on the CPU
    max_grad_norm: float | None = 1.0
    evaluate_every: int = 0  # steps; 0: at the end of each stage only
    checkpoint_every: int = 1000  # steps; besides the end of each stage
    keep_checkpoints: int | None = 2  # the newest; none: all
    trust_ratios_every: int = 50  # steps; 0: never
    tensorboard: bool = False


@dataclass(frozen=True)
class BertChoice:
    """A BERT by its usual name, with what differs from it."""

    name: str = "base"
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1


@dataclass(frozen=True)
class TextData:
    """A corpus made by `largebatch prepare`."""

    path: str = ""
    masked_lm_probability: float = 0.15
    short_sequence_probability: float = 0.1
    whole_word_masking: bool = False
    evaluation_sequences: int = 2048


@dataclass(frozen=True)
class PretrainingConfig(RunConfig):
    """BERT pre-training: masked words and next sentences."""

    kind: ClassVar[str] = "pretraining"

    model: BertChoice = field(default_factory=BertChoice)
    data: TextData = field(default_factory=TextData)


@dataclass(frozen=True)
class ImageData:
    """A folder of images in the data set's own format."""

    path: str = ""
    dataset: str = "mnist"  # or fashion-mnist


@dataclass(frozen=True)
class ClassificationConfig(RunConfig):
    """Image classification."""

    kind: ClassVar[str] = "classification"

    model: str = "lenet"
    data: ImageData = field(default_factory=ImageData)


@dataclass(frozen=True)
class SquadData:
    """Question answering in SQuAD's JSON format; several training files are joined with commas."""

    train: str = ""
    test: str = ""
    bad_answers: str = "error"  # or skip: leave out answers that are not where the file says
    unanswered_windows: bool = True  # train windows that do not hold their answer to point at [CLS]; False drops them
    max_sequence_length: int = 384
    document_stride: int = 128
    max_query_length: int = 64


@dataclass(frozen=True)
class SquadConfig(RunConfig):
    """Question answering from a pre-trained encoder."""

    kind: ClassVar[str] = "squad"

    epochs: float = 2.0  # passes over the training set, for stages whose steps are 0
    init: str = ""  # a run, or a folder in Hugging Face's format
    random_encoder: bool = False  # the baseline: the same model and tokenizer with fresh weights
    data: SquadData = field(default_factory=SquadData)


KINDS: dict[str, type[RunConfig]] = {c.kind: c for c in (PretrainingConfig, ClassificationConfig, SquadConfig)}


def to_json(config: RunConfig) -> dict[str, Any]:
    """The configuration as nested plain values, with its kind."""
    return {"kind": config.kind, **dataclasses.asdict(config)}


def from_json(content: Mapping[str, Any]) -> RunConfig:
    """The inverse of `to_json`.

    Raises:
        UserError: an unknown kind or key, or a value of another type.
    """
    values = dict(content)
    kind = values.pop("kind", None)
    if kind not in KINDS:
        raise UserError(f"kind is {kind!r} in the configuration; it must be one of {', '.join(KINDS)}")
    return _build(KINDS[kind], values, "")


def override(config: RunConfig, assignments: Iterable[str], *, is_new: bool = True) -> RunConfig:
    """Apply `key=value` settings, keys dotted into the nested parts and stages by number: `stages.0.steps=100`.

    Args:
        config: what is set anew.
        assignments: the settings.
        is_new: False for a run that was begun, which may have been told what no stage uses.

    Raises:
        UserError: a key that does not exist (the nearest is named), a value of another type, or a rate, warm-up or
            power that no stage would use.
    """
    content = to_json(config)
    assigned = []
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(f"--set {assignment}: write KEY=VALUE, for example --set optim.lr=1e-3")
        _assign(content, key.strip(), text.strip())
        assigned.append(key.strip())
    changed = from_json(content)
    if is_new:
        _refuse_idle_rates(changed, assigned)
    return changed


def keys(config: RunConfig) -> list[str]:
    """Every dotted key that `override` knows for this configuration."""
    return list(_flatten(to_json(config)))


def _flatten(content: Any, prefix: str = "") -> Iterable[str]:
    if isinstance(content, dict):
        items: Iterable[tuple[str, Any]] = content.items()
    else:
        items = ((str(index), value) for index, value in enumerate(content))
    for name, value in items:
        nested = isinstance(value, dict) or (isinstance(value, (list, tuple)) and value and isinstance(value[0], dict))
        if nested:
            yield from _flatten(value, f"{prefix}{name}.")
        elif f"{prefix}{name}" not in ("kind", "recipe"):
            yield f"{prefix}{name}"


def _assign(content: dict[str, Any], key: str, text: str) -> None:
    known = list(_flatten(content))
    if key not in known:
        nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
        hint = f"; the nearest is {nearest[0]}" if nearest else f"; known are {', '.join(known)}"
        raise UserError(f"there is no setting {key}{hint}")
    *path, last = key.split(".")
    node: Any = content
    for part in path:
        if isinstance(node, (list, tuple)):
            node = node[int(part)]
        else:
            node[part] = list(node[part]) if isinstance(node[part], tuple) else node[part]
            node = node[part]
    node[last] = _Text(text)


def _refuse_idle_rates(config: RunConfig, assigned: Iterable[str]) -> None:
    """Refuse to be told what no curve of the run is made from, whatever the value."""
    first, begin = 0, {}  # stage -> where its curve begins
    for index, stage in enumerate(config.stages):
        first = first if stage.schedule == "continue" else index
        begin[f"stages.{index}"] = first
    own = all(config.stages[index].learning_rate is not None for index in begin.values())
    for key in assigned:
        stage, _, name = key.rpartition(".")
        if name in ("learning_rate", "warmup_steps", "power") and stage != f"stages.{begin[stage]}":
            raise UserError(
                f"{key} has no effect: {stage}.schedule is continue; set stages.{begin[stage]}.{name}, "
                f"or another {stage}.schedule"
            )
        if key == "optim.lr" and own:
            where = f"stages.{min(begin.values())}.learning_rate"
            raise UserError(f"optim.lr has no effect: every stage has a rate of its own; set {where} and so on instead")


class _Text(str):
    """A value from the command line, still to be read as its field's type."""


def _build(cls: type[C], values: Mapping[str, Any], where: str) -> C:
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for name in values:
        if name not in names:
            nearest = difflib.get_close_matches(name, names, n=1)
            raise UserError(
                f"there is no setting {where}{name}" + (f"; the nearest is {where}{nearest[0]}" if nearest else "")
            )
    return cls(**{name: _convert(value, hints[name], f"{where}{name}") for name, value in values.items()})


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, _Text) and value.lower() in ("none", "null")):
            return None
        return _convert(value, next(arg for arg in args if arg is not type(None)), where)
    if origin is tuple:
        items = (
            [_Text(part.strip()) for part in value.split(",") if part.strip()]
            if isinstance(value, str)
            else list(value)
        )
        if args[-1] is not Ellipsis and len(items) != len(args):
            raise UserError(f"{where} takes {len(args)} values joined by commas, not {value!r}")
        each = [args[0]] * len(items) if args[-1] is Ellipsis else args
        return tuple(_convert(item, arg, f"{where}.{i}") for i, (item, arg) in enumerate(zip(items, each, strict=True)))
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type[Any], hint), value, f"{where}.")
    return _scalar(value, hint, where)


def _scalar(value: Any, hint: type, where: str) -> Any:
    try:
        if hint is bool:
            if isinstance(value, bool):
                return value
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[value.lower()]
        if hint is str:
            return str(value)
        if isinstance(value, bool):
            raise TypeError
        if hint is float:
            return float(value)
        try:
            return int(str(value))
        except ValueError:
            as_float = float(value)  # "1e6"
            if as_float != int(as_float):
                raise
            return int(as_float)
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError):
        kind = {bool: "true or false", int: "a whole number", float: "a number"}[hint]
        raise UserError(f"{where}={value} is not {kind}") from None
