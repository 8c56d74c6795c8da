"""What the measured quantities are called, their units, their final values and the baselines they are judged by."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from largebatch.report.read import Run, is_number, number


@dataclass(frozen=True)
class Quantity:
    """A measured quantity; what is shown is `scale` times what is recorded, in `unit`."""

    label: str
    unit: str = ""
    scale: float = 1.0
    lower_is_better: bool = False

    @property
    def axis(self) -> str:
        return f"{self.label} ({self.unit})" if self.unit else self.label

    def text(self, value: float, unit: bool = True) -> str:
        """`value` as recorded, for a table or a sentence."""
        if not math.isfinite(value):
            return "not finite"
        shown = value * self.scale
        digits = {"%": 2, "nat": 3}.get(self.unit)
        figure = f"{shown:,.{digits}f}" if digits is not None else compact(shown)
        return f"{figure} {self.unit}" if self.unit and unit else figure

    def difference(self, recorded: float) -> str:
        """A signed difference of two recorded values; empty when it is not finite."""
        if not math.isfinite(recorded):
            return ""
        digits, unit = (2, " points") if self.unit == "%" else (3, f" {self.unit}" if self.unit else "")
        return f"{recorded * self.scale:+.{digits}f}{unit}".replace("-", "−")


# Exact match and F1 are percentages as the official SQuAD script gives them; accuracies are recorded as fractions.
KNOWN = {
    "loss": Quantity("Loss", "nat", lower_is_better=True),
    "mlm_loss": Quantity("MLM loss", "nat", lower_is_better=True),
    "nsp_loss": Quantity("NSP loss", "nat", lower_is_better=True),
    "accuracy": Quantity("Accuracy", "%", 100),
    "mlm_accuracy": Quantity("MLM accuracy", "%", 100),
    "nsp_accuracy": Quantity("NSP accuracy", "%", 100),
    "f1_error": Quantity("F1, standard error", "%"),
    "exact_match": Quantity("Exact match", "%"),
    "f1": Quantity("F1", "%"),
    "perplexity": Quantity("Perplexity", lower_is_better=True),
    "lr": Quantity("Learning rate"),
    "grad_norm": Quantity("Gradient norm (L2)"),
    "tokens_per_s": Quantity("Tokens/s"),
    "sequences_per_s": Quantity("Sequences/s"),
    "flops_per_s": Quantity("Achieved FLOP/s"),
    "mfu": Quantity("Model FLOPs utilisation", "%", 100),
}
# What a run is judged by, most telling first.
SCORES = ("mlm_loss", "mlm_accuracy", "nsp_accuracy", "f1", "exact_match", "accuracy", "perplexity", "nsp_loss", "loss")
SPLITS = {"heldout": "held-out", "train": "training"}


def quantity(key: str) -> Quantity:
    """The quantity recorded as `key`; of an unknown key the kind is read off its ending."""
    if key in KNOWN:
        return KNOWN[key]
    words = key.replace("_", " ").strip()
    label = words[:1].upper() + words[1:]
    if key.endswith("_loss"):
        return Quantity(label, "nat", lower_is_better=True)
    if key.endswith("_accuracy"):
        return Quantity(label, "%", 100)
    return Quantity(label)


def split_name(split: str) -> str:
    return SPLITS.get(split, split)


def titled(split: str, label: str) -> str:
    """("heldout", "Loss") -> "Held-out loss"; abbreviations stay upper case."""
    if not split:
        return label
    ordinary = label[1:2].islower()
    text = f"{split_name(split)} {label[0].lower() if ordinary else label[0]}{label[1:]}"
    return text[0].upper() + text[1:]


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings and lists -> (dotted name, leaf), in order; an empty one is a leaf."""
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, list) and any(isinstance(item, (Mapping, list)) for item in tree):
        for i, value in enumerate(tree):
            yield from flatten(value, f"{prefix}.{i}")
    else:
        yield prefix, tree


def final_figures(run: Run) -> dict[tuple[str, str], float]:
    """(split, key) -> the final evaluation; of an unfinished run the latest there is.

    The summary's figures may be flat, or nested by split; flat ones belong to the one split that was evaluated.
    """
    evaluation = run.summary.get("evaluation")
    splits = list(dict.fromkeys(e.split for e in run.evaluations))
    if isinstance(evaluation, Mapping) and evaluation:
        only = splits[0] if len(splits) == 1 else ""
        named = ((*name.rpartition("."), value) for name, value in flatten(evaluation) if is_number(value))
        return {(split or only, key): number(value) for split, _, key, value in named}
    return {(e.split, key): value for e in run.evaluations for key, value in e.values.items()}


def scores(run: Run) -> dict[tuple[str, str], float]:
    """The part of the final figures a run is judged by, most telling first."""
    figures = final_figures(run)
    return {(split, key): figures[split, key] for wanted in SCORES for split, key in figures if key == wanted}


def baselines(run: Run, key: str) -> list[tuple[str, float]]:
    """(name, value) of what the summary compares `key` with.

    The longest quantity that the name ends in counts: `{"unigram_mlm_loss": 6.9}` belongs to the MLM loss,
    `{"chance_accuracy": 0.1}` and `{"chance": {"accuracy": 0.1}}` to the accuracy. An entropy belongs to the MLM loss,
    or to the loss where there is no MLM.
    """
    found = []
    for name, value in flatten(run.summary.get("baselines") or {}):
        if value is not None and is_number(value) and _compared(run, name) == key:
            label = name.removesuffix(key).rstrip("._").replace("_", " ").replace(".", " ")
            label = "unigram entropy" if label == "unigram" and key.endswith("loss") else label or "baseline"
            found.append((label, number(value)))
    return found


def _compared(run: Run, name: str) -> str | None:
    """The quantity that the baseline `name` is a value of."""
    if name.endswith("entropy"):
        return "mlm_loss" if "mlm_loss" in run.steps or any("mlm_loss" in e.values for e in run.evaluations) else "loss"
    keys = {*SCORES, *run.steps, *(key for _, key in final_figures(run))}
    return max((k for k in keys if name == k or name.endswith((f"_{k}", f".{k}"))), key=len, default=None)


def compact(value: float) -> str:
    """Four significant digits, thousands separated."""
    if not math.isfinite(value):
        return "not finite"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def magnitude(value: float) -> str:
    """12345678 -> "12.3 million"."""
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.3g} {word}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Seconds as a reader would say them, in spaces that do not break."""
    if not math.isfinite(seconds):
        return "unknown time"
    if seconds < 60:
        return f"{seconds:.3g}\u00a0s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}\u00a0min\u00a0{rest}\u00a0s"
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours}\u00a0h\u00a0{minutes}\u00a0min" if hours < 48 else f"{hours // 24}\u00a0days\u00a0{hours % 24}\u00a0h"
    )
