"""`largebatch demo`: the whole job on a small corpus that the package ships, in minutes on a laptop CPU."""

import dataclasses
import math
import sys
import time
from pathlib import Path

from torch import nn

from largebatch.data import prepare, render_report
from largebatch.errors import UserError
from largebatch.experiments import recipes
from largebatch.experiments.commands import resumed
from largebatch.experiments.config import RunConfig, SquadConfig, override
from largebatch.experiments.console import RunDisplay, show_table
from largebatch.experiments.optimizers import build_optimizer
from largebatch.experiments.runner import Interrupted, config_of, run
from largebatch.experiments.stages import build_stages
from largebatch.report import report
from largebatch.train import TrainingDiverged
from largebatch.train.metrics import check_folder

ASSETS = Path(__file__).resolve().parent.parent / "assets"
VOCABULARY_SIZE = 8192


def demo(out: Path, settings: list[str]) -> int:
    """Prepare, pre-train in two stages, fine-tune, evaluate, report. An interrupted demo goes on where it stopped.

    Args:
        out: folder for the corpus and the runs. One that holds a finished demo is left alone, and the next free
            name is taken.
        settings: `key=value` for the pre-training.

    Raises:
        UserError: a setting is wrong, or `out` cannot be written to, or holds something else or an unfinished demo of
            other settings.
    """
    started = time.monotonic()
    check_folder(out)
    out = _free_folder(out)
    pretraining = _pretraining(out, settings)
    build_stages(pretraining)  # of what can be wrong, most before minutes are spent
    build_optimizer(pretraining.optim, nn.Linear(1, 1))
    try:
        return _demo(out, pretraining, started)
    except Interrupted:
        print("largebatch: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except TrainingDiverged as error:
        print(f"largebatch: {error}; its metrics are in {out}", file=sys.stderr)
        return 1


def _demo(out: Path, pretraining: RunConfig, started: float) -> int:
    print(
        f"Demo in {out}: raw text -> tokens -> two-stage pre-training with LAMB -> fine-tuning -> evaluation -> report"
    )

    print("\n1. Prepare: 18 classic books -> documents -> sentences -> WordPiece -> token shards")
    if not (out / "corpus" / "manifest.json").exists():
        manifest = prepare([ASSETS / "demo_corpus"], out / "corpus", vocab_size=VOCABULARY_SIZE, heldout=0.05)
        print(render_report(manifest))

    print("\n2. Pre-train: masked words and next sentences; " + _describe(pretraining))
    pretrained = _run(pretraining, out / "pretraining")

    print("\n3. Fine-tune on questions about a few Wikipedia articles; test on others")
    tuned = _run(_squad(out, random_encoder=False), out / "squad")
    print("   The same from a random encoder:")
    untrained = _run(_squad(out, random_encoder=True), out / "squad-random")

    print("\n4. Report")
    page = report([out / name for name in ("pretraining", "squad", "squad-random")], out / "report")
    unigram = pretrained["baselines"]["unigram_mlm_loss"]
    loss = pretrained["evaluation"]["mlm_loss"]
    majority = f"{pretrained['baselines']['majority_nsp_accuracy']:.1%}"
    rows = [
        ["masked words, loss (nat)", f"{loss:.3f}", f"{unigram:.3f}", "unigram entropy of the corpus"],
        ["masked words, accuracy", f"{pretrained['evaluation']['mlm_accuracy']:.1%}", "", ""],
        [
            "next sentence, accuracy",
            f"{pretrained['evaluation']['nsp_accuracy']:.1%}",
            majority,
            "one answer always",
        ],
        [
            "answers, F1 (%)",
            *(f"{run['evaluation']['f1']:.1f} ± {run['evaluation']['f1_error']:.1f}" for run in (tuned, untrained)),
            "from a random encoder",
        ],
        ["answers, exact match (%)", *(f"{run['evaluation']['exact_match']:.1f}" for run in (tuned, untrained)), ""],
    ]
    show_table("On text and articles held out from training", ["", "reached", "baseline", "baseline is"], rows)
    gain = tuned["evaluation"]["f1"] - untrained["evaluation"]["f1"]
    chance = 2 * math.hypot(tuned["evaluation"]["f1_error"], untrained["evaluation"]["f1_error"])
    verdict = "more" if abs(gain) > chance else "no more"
    print(f"Pre-training changed F1 by {gain:+.1f}: {verdict} than chance would ({chance:.1f}, two standard errors).")
    print("The questions are an extract of SQuAD v1.1's development set: no figure to set beside published ones.")
    print(f"Done in {time.monotonic() - started:.0f} s. A demonstration: three minutes of training on 12 MB of text.")
    print(f"Report: {page}")
    return 0


def _free_folder(out: Path) -> Path:
    if out.exists() and any(out.iterdir()) and not (out / "corpus").exists() and not (out / "corpus.partial").exists():
        raise UserError(f"{out} holds something other than a demo; name another folder with --out")
    candidate, number = out, 1
    while (candidate / "report" / "report.html").exists():
        number += 1
        candidate = out.with_name(f"{out.name}-{number}")
    return candidate


def _pretraining(out: Path, settings: list[str]) -> RunConfig:
    """What to pre-train by; of a demo that is taken up again, by what it was begun with."""
    corpus, begun = f"data.path={(out / 'corpus').resolve()}", out / "pretraining"
    if (begun / "config.json").exists():
        return resumed(config_of(begun), begun, settings)
    return override(recipes.get("bert-demo"), [corpus, *settings])


def _squad(out: Path, *, random_encoder: bool) -> SquadConfig:
    config = recipes.get("squad-demo")
    assert isinstance(config, SquadConfig)
    data = dataclasses.replace(
        config.data,
        train=str(ASSETS / "squad_extract" / "train.json"),
        test=str(ASSETS / "squad_extract" / "test.json"),
    )
    name = "squad-demo-random" if random_encoder else "squad-demo"
    init = str((out / "pretraining").resolve())
    return dataclasses.replace(config, recipe=name, init=init, random_encoder=random_encoder, data=data)


def _run(config: RunConfig, out: Path) -> dict:
    with RunDisplay(config.recipe) as display:
        return run(config, out, resume=True, on_step=display.step, on_event=display.event)


def _describe(config: RunConfig) -> str:
    return ", then ".join(f"{stage.steps} steps at batch {stage.batch_size} ({stage.name})" for stage in config.stages)
