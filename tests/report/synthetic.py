"""Run directories as training writes them, made up in milliseconds: smooth curves with noise, from a seed."""

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

BERT_MATRICES = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
UNIGRAM = 6.93


def bert_layers(num_blocks: int, *, everything: bool = False) -> list[str]:
    """Names of a BERT's matrices, or of all its tensors (24 blocks: 398)."""
    norm = (".LayerNorm.weight", ".LayerNorm.bias") if everything else ()
    both = (".weight", ".bias") if everything else (".weight",)
    names = [f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")]
    names += [f"bert.embeddings{end}" for end in norm]
    for block in range(num_blocks):
        prefix = f"bert.encoder.layer.{block}"
        for matrix in BERT_MATRICES:
            names += [f"{prefix}.{matrix}{end}" for end in both]
            if matrix.endswith("output.dense"):
                names += [f"{prefix}.{matrix.removesuffix('.dense')}{end}" for end in norm]
    names += [f"bert.pooler.dense{end}" for end in both]
    names += [f"cls.predictions.transform.dense{end}" for end in both]
    names += [f"cls.predictions.transform{end}" for end in norm] + (["cls.predictions.bias"] if everything else [])
    return names + [f"cls.seq_relationship{end}" for end in both]


LENET_LAYERS = ["conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight"]
TWO_STAGES = (("seq128", 128, 512, 450, 1e-2, 45), ("seq512", 512, 128, 50, 5e-3, 5))


def write_run(
    folder: Path,
    *,
    kind: str = "pretraining",
    recipe: str = "bert-tiny",
    stages: Sequence[tuple[str, int | None, int, int, float, int]] = TWO_STAGES,
    layers: Sequence[str] = tuple(bert_layers(2)),
    optimizer: str = "lamb",
    seed: int = 0,
    quality: float = 1.0,
    evaluate_every: int = 50,
    ratios_every: int = 10,
    stop_at: int | None = None,
    diverge_at: int | None = None,
    resumes: Sequence[int] = (),
    mfu: bool = True,
    config: dict[str, Any] | None = None,
    baselines: dict[str, Any] | None = None,
) -> Path:
    """Write a run directory.

    Args:
        stages: (name, sequence length, batch, steps, peak rate, warm-up steps) each.
        quality: how fast it learns; 1 is ordinary.
        stop_at: the run is in progress after this step, and has no summary.
        diverge_at: the loss grows from here on, and is NaN after a while.
        resumes: steps after which training was taken up again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    noise = random.Random(f"{seed} {optimizer} {recipe}")
    total = sum(stage[3] for stage in stages)
    (folder / "config.json").write_text(json.dumps(_config(kind, recipe, stages, optimizer, seed, config or {})))
    (folder / "env.json").write_text(json.dumps(_environment(recipe)))
    lines: list[dict[str, Any]] = []
    samples, step, elapsed = 0, 0, 0.0
    evaluation: dict[str, float] = {}
    for name, length, batch, steps, peak, warmup in stages:
        lines.append({"event": "stage", "step": step + 1, "stage": name, "batch_size": batch})
        for stage_step in range(1, steps + 1):
            step += 1
            if stop_at is not None and step > stop_at:
                break
            samples += batch
            took = (batch * (length or 28) / 40000) * noise.lognormvariate(0, 0.05) * (3 if stage_step == 1 else 1)
            elapsed += took
            where = {"step": step, "stage": name}
            rate = peak * min(stage_step / max(1, warmup), 1 - (stage_step - 1) / steps if stage_step > warmup else 1)
            metrics = _METRICS[kind](step / total, quality, noise)
            if diverge_at is not None and step >= diverge_at:
                growth = math.exp(0.12 * (step - diverge_at)) if step < diverge_at + 30 else math.nan
                metrics = {k: v * growth if k.endswith("loss") else 0.02 for k, v in metrics.items()}
            norm = noise.lognormvariate(0.3 - 0.6 * min(1, 4 * step / total), 0.25)
            if not math.isfinite(metrics["loss"]):
                norm = math.nan
            tokens = batch * (length or 0) * 0.93
            flops = tokens * 6 * 4.4e6
            lines.append({
                "event": "step", **where, "stage_step": stage_step, "samples": samples, "lr": rate, **metrics,
                "grad_norm": norm, "clipped": norm > 1, "skipped": math.isnan(norm), "tokens_per_s": tokens / took,
                "sequences_per_s": batch / took, "flops_per_s": flops / took,
                "mfu": flops / took / 2e12 if mfu else None, "data_s": took / 100, "time_s": elapsed,
            })  # fmt: skip
            if optimizer in ("lamb", "lars") and (step == 1 or step % ratios_every == 0):
                lines.append({"event": "trust_ratios", **where, "ratios": _ratios(layers, step / total, noise)})
            if step % evaluate_every == 0 or stage_step == steps:
                evaluation = _EVALUATIONS[kind](_METRICS[kind](step / total, quality, noise), noise)
                if diverge_at is not None and step >= diverge_at + 30:
                    evaluation = {k: math.nan if k.endswith("loss") else v / 20 for k, v in evaluation.items()}
                split = "heldout" if kind == "pretraining" else "test"
                lines.append({"event": "eval", **where, "split": split, **evaluation})
            if step in resumes:
                lines.append({"event": "resume", "step": step})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if stop_at is None:
        split = "heldout" if kind == "pretraining" else "test"
        given = {"unigram_mlm_loss": UNIGRAM} if kind == "pretraining" else {}
        summary = {
            "recipe": recipe, "kind": kind, "status": "complete", "steps": total, "samples": samples,
            "tokens": int(sum(s[2] * s[3] * (s[1] or 0) for s in stages) * 0.93), "wall_s": elapsed,
            "parameters": 4_416_698, "peak_flops_per_s": 2e12, "evaluation": {"split": split, **evaluation},
            "baselines": given if baselines is None else baselines, "notes": [],
        }  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def write_mnist(folder: Path, optimizer: str, **changes: Any) -> Path:
    """A LeNet run."""
    quality = {"lamb": 1.2, "adamw": 1.1, "lars": 0.9, "sgd": 0.8}.get(optimizer, 1.0)
    settings: dict[str, Any] = {
        "kind": "classification", "recipe": "lenet-mnist", "stages": [("mnist", None, 1024, 580, 4e-3, 19)],
        "layers": LENET_LAYERS, "optimizer": optimizer, "quality": quality, "config": {"model": "lenet"},
    }  # fmt: skip
    return write_run(folder, **{**settings, **changes})


def write_squad(folder: Path, *, random_encoder: bool, **changes: Any) -> Path:
    """A fine-tuning run, from a pre-trained or a random encoder."""
    settings: dict[str, Any] = {
        "kind": "squad", "recipe": "squad-demo" + ("-random" if random_encoder else ""),
        "stages": [("squad", 128, 32, 240, 5e-4, 24)], "optimizer": "adamw", "quality": 0.4 if random_encoder else 1.0,
        "config": {"random_encoder": random_encoder}, "evaluate_every": 60,
    }  # fmt: skip
    return write_run(folder, **{**settings, **changes})


def _config(kind: str, recipe: str, stages: Sequence[tuple[Any, ...]], optimizer: str, seed: int, more: dict) -> dict:
    keys = ("name", "sequence_length", "batch_size", "steps", "learning_rate", "warmup_steps")
    return {
        "kind": kind,
        "recipe": recipe,
        "stages": [dict(zip(keys, stage, strict=True)) | {"schedule": "polynomial"} for stage in stages],
        "optim": {"name": optimizer, "lr": stages[0][4], "betas": [0.9, 0.999], "exclude": ["bias", "LayerNorm"]},
        "seed": seed,
        "max_grad_norm": 1.0,
        "model": {"name": "tiny", "hidden_dropout": 0.0},
        **more,
    }


def _environment(recipe: str) -> dict[str, Any]:
    return {
        "python": "3.11.9", "torch": "2.13.0+cpu", "cpu": "AMD EPYC 7B13", "cpu_cores": 2, "threads": 2,
        "memory_bytes": 16 << 30, "device": "cpu", "gpu": None, "world_size": 1, "git_commit": "0" * 40,
        "command": f"largebatch train {recipe}", "started_utc": "2025-06-01T08:00:00+00:00",
    }  # fmt: skip


def _pretraining(progress: float, quality: float, noise: random.Random) -> dict[str, float]:
    fall = 1 / (1 + math.exp(-18 * (progress * quality - 0.3)))
    mlm = 9.0 - 2.0 * min(1, 25 * progress) - 2.2 * fall - 0.4 * progress * quality + noise.gauss(0, 0.05)
    nsp = 0.693 - 0.12 * max(0, progress * quality - 0.4) + noise.gauss(0, 0.012)
    return {
        "loss": mlm + nsp,
        "mlm_loss": mlm,
        "mlm_accuracy": min(0.99, max(0, 0.06 + 0.3 * fall + noise.gauss(0, 0.008))),
        "nsp_loss": nsp,
        "nsp_accuracy": 0.5 + 0.2 * max(0, progress * quality - 0.4) + noise.gauss(0, 0.02),
    }


def _squad(progress: float, quality: float, noise: random.Random) -> dict[str, float]:
    return {"loss": 4.8 - (0.8 + 1.5 * quality) * (1 - math.exp(-3 * progress)) + noise.gauss(0, 0.15)}


def _classification(progress: float, quality: float, noise: random.Random) -> dict[str, float]:
    loss = (2.3 * math.exp(-40 * progress * quality) + 0.012 / quality + 0.1 * math.exp(-6 * progress)) * (
        noise.lognormvariate(0, 0.15)
    )
    return {"loss": loss, "accuracy": max(0.1, 1 - loss / 3 - 0.002 * noise.random())}


_METRICS: dict[str, Callable[[float, float, random.Random], dict[str, float]]] = {
    "pretraining": _pretraining,
    "squad": _squad,
    "classification": _classification,
}
_EVALUATIONS: dict[str, Callable[[dict[str, float], random.Random], dict[str, float]]] = {
    "pretraining": lambda metrics, noise: {k: v for k, v in metrics.items() if k != "loss"},
    "squad": lambda metrics, noise: {
        "exact_match": max(0.0, 30 * (4.6 - metrics["loss"]) / 2.4),
        "f1": max(0.0, 42 * (4.7 - metrics["loss"]) / 2.4),
        "f1_error": max(0.0, 2 * (4.7 - metrics["loss"]) / 2.4),
        "num_questions": 412,
    },
    "classification": lambda metrics, noise: {
        "loss": metrics["loss"] * 1.3,
        "accuracy": min(0.9955, metrics["accuracy"]),
    },
}


def _ratios(layers: Sequence[str], progress: float, noise: random.Random) -> dict[str, float]:
    ratios = {}
    for i, name in enumerate(layers):
        scale = {"embeddings": 0.02, "LayerNorm": 1.0, "bias": 0.004}.get(
            next((word for word in ("LayerNorm", "bias", "embeddings") if word in name), ""), 0.05 * (1 + 0.02 * i)
        )
        if name.endswith("bias") and progress < 0.002:
            ratios[name] = 1.0  # zero-initialised
        else:
            ratios[name] = scale * (1 + 6 * progress * (1 + i % 5) / 5) * noise.lognormvariate(0, 0.1)
    return ratios
