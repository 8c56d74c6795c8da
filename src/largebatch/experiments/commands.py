"""The commands behind the command line: they turn options into calls, and results into a few lines of text."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from largebatch.errors import UserError
from largebatch.experiments import recipes
from largebatch.experiments.config import RunConfig, SquadConfig, keys, override, to_json
from largebatch.experiments.console import RunDisplay, show_table
from largebatch.experiments.runner import ELASTIC, PLACES, Interrupted, config_of, describe_evaluation, figures_of, run
from largebatch.train import TrainingDiverged, distributed
from largebatch.train.metrics import check_folder


def train(options: argparse.Namespace) -> int:
    """`largebatch train`."""
    if options.list:
        _list(options.recipe)
        return 0
    if options.recipe is None and (options.out is None or not options.resume):
        raise UserError("name a recipe to train; `largebatch train --list` shows all")
    out = options.out or Path("runs") / options.recipe
    if options.resume and (out / "config.json").exists():
        saved = config_of(out)
        if options.recipe not in (None, saved.recipe):
            raise UserError(
                f"{out} is a run of {saved.recipe}, not of {options.recipe}; leave it out, or name another folder"
            )
        return resume(saved, out, _settings(options), options.threads)
    if options.recipe is None:
        raise UserError(f"there is no run in {out} to resume; correct --out, or name a recipe to begin one")
    return execute(configure(options), out, threads=options.threads)


def configure(options: argparse.Namespace) -> RunConfig:
    """Return the recipe that the options name, with its data and settings."""
    config = recipes.get(options.recipe)
    if options.data and isinstance(config, SquadConfig):
        raise UserError("the recipe squad takes its data with `largebatch finetune squad --train F --test F`")
    return override(config, _settings(options))


def _settings(options: argparse.Namespace) -> list[str]:
    """What --data and --set ask for."""
    return _with_whole_paths([*([f"data.path={options.data}"] if options.data else []), *options.set])


def _with_whole_paths(settings: list[str]) -> list[str]:
    """The settings, with paths as they are from any directory; those of data.train are joined by commas."""
    whole = []
    for setting in settings:
        key, _, value = setting.partition("=")
        if key.strip() in (*PLACES, "init") and value:
            paths = value.split(",") if key.strip() == "data.train" else [value]
            setting = f"{key}={','.join(str(Path(path).resolve()) for path in paths)}"
        whole.append(setting)
    return whole


def resume(saved: RunConfig, out: Path, settings: list[str], threads: int | None) -> int:
    """Go on with the run in `out`, with the settings it was started with but for those that may change."""
    return execute(resumed(saved, out, settings), out, resume=True, threads=threads)


def resumed(saved: RunConfig, out: Path, settings: list[str]) -> RunConfig:
    """Return the configuration of the run in `out` with the settings that may change when it is resumed.

    Settings that are repeated are welcome: torchrun restarts a job with its old command line.

    Raises:
        UserError: others differ from the run's.
    """
    may_change = ELASTIC if (out / "summary.json").exists() else (*ELASTIC, *PLACES)

    def is_elastic(setting: str) -> bool:
        key = setting.partition("=")[0].strip()
        return key in may_change or (key.startswith("stages.") and key.endswith(".micro_batch_size"))

    # "auto" was resolved when the run began, and of a setting that is given twice the last counts.
    fixed = [setting for setting in settings if not is_elastic(setting) and not setting.endswith("=auto")]
    if override(saved, fixed, is_new=False) != saved:
        changed = [setting for setting in fixed if override(saved, [setting], is_new=False) != saved]
        raise UserError(
            f"a resumed run keeps the settings in {out / 'config.json'}, all but "
            f"{', '.join(may_change)} and stages.N.micro_batch_size; leave {', '.join(changed)} out"
        )
    return override(saved, [setting for setting in settings if is_elastic(setting)])


def execute(config: RunConfig, out: Path, *, resume: bool = False, threads: int | None = None) -> int:
    """Run a configuration with a display; print where the results lie. Returns the exit status."""
    import torch

    if distributed.is_chief():
        check_folder(out)
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with RunDisplay(config.recipe) as display:
            summary = run(config, out, resume=resume, on_step=display.step, on_event=display.event)
    except Interrupted as stop:
        if distributed.is_chief():
            print(f"largebatch: {stop}", file=sys.stderr)
        return 130
    except TrainingDiverged as error:
        distributed.let_first_rank_speak()
        print(f"largebatch: {error}; its metrics are in {out}", file=sys.stderr)
        return 1
    if distributed.is_chief():
        show_summary(summary, out)
    return 0


def show_summary(summary: dict[str, Any], out: Path) -> None:
    """Print the figures of a finished run."""
    rows = [["steps", f"{summary['steps']:,}"], ["samples", f"{summary['samples']:,}"]]
    if summary["tokens"]:
        rows.append(["tokens", f"{summary['tokens']:,}"])
    rows += [["time in steps", f"{summary['wall_s']:.0f} s"], ["parameters", f"{summary['parameters']:,}"]]
    rows += [
        [f"{summary['evaluation'].get('split', '')} {name}".strip(), f"{value:.4f}"]
        for name, value in figures_of(summary["evaluation"]).items()
    ]
    rows += [[f"baseline {name}", f"{value:.4f}"] for name, value in summary["baselines"].items()]
    show_table(f"{summary['recipe']}: {out}", ["", ""], rows)
    for note in summary["notes"]:
        print(f"note: {note}")


def finetune(options: argparse.Namespace) -> int:
    """`largebatch finetune squad`."""
    out = options.out or Path("runs/squad")
    settings = _finetune_settings(options)
    if options.resume and (out / "config.json").exists():
        saved = config_of(out)
        if not isinstance(saved, SquadConfig):
            raise UserError(f"{out} is a run of {saved.recipe}; go on with `largebatch train --resume --out {out}`")
        return resume(saved, out, settings, options.threads)
    for name in ("model", "train", "test"):
        if getattr(options, name) is None:
            where = f"there is no run in {out} to resume; to begin one, " if options.resume else ""
            raise UserError(f"{where}name the {name} with --{name}; `largebatch finetune --help` says what it takes")
    return execute(override(recipes.get("squad"), settings), out, threads=options.threads)


def _finetune_settings(options: argparse.Namespace) -> list[str]:
    """What --set and the options before it ask for."""
    settings = []
    if options.model is not None:
        settings.append(f"init={options.model}")
    if options.train is not None:
        settings.append(f"data.train={options.train}")
    if options.test is not None:
        settings.append(f"data.test={options.test}")
    if options.skip_bad_answers:
        settings.append("data.bad_answers=skip")
    if options.epochs is not None:
        settings.append(f"epochs={options.epochs}")
    return _with_whole_paths([*settings, *options.set])


def evaluate(options: argparse.Namespace) -> int:
    """`largebatch evaluate`."""
    from largebatch.experiments.evaluation import answer_file, evaluate_run, score_file

    if options.predictions:
        if not options.squad:
            raise UserError("name the SQuAD file that the predictions answer with --squad")
        figures = score_file(Path(options.squad), Path(options.predictions))
    elif options.run is None:
        raise UserError("name a run to evaluate, or --squad FILE and --predictions FILE to score")
    elif options.squad:
        if options.data is not None:
            raise UserError("--data is where a run's own data lie; leave it out with --squad")
        figures = answer_file(options.run, Path(options.squad))
    else:
        figures = evaluate_run(options.run, options.data)
    print(describe_evaluation(figures))
    print(json.dumps(figures))
    return 0


def export(options: argparse.Namespace) -> int:
    """`largebatch export`."""
    from largebatch.experiments.transfer import export_to_hf

    out = options.out or options.run / "hf"
    export_to_hf(options.run, out)
    print(f"{out}: load it with transformers.AutoModel.from_pretrained({str(out)!r})")
    return 0


def report(options: argparse.Namespace) -> int:
    """`largebatch report`."""
    from largebatch.report import report as write_report
    from largebatch.report import summarize

    page = write_report(options.runs, options.out)
    for table in summarize(options.runs):
        show_table(table.title, list(table.columns), [list(row) for row in table.rows])
    print(page)
    return 0


def _list(name: str | None) -> None:
    if name is None:
        rows = [
            [known, (function.__doc__ or "").strip().splitlines()[0]] for known, function in recipes.RECIPES.items()
        ]
        for known, text in rows:
            print(f"{known:26s}{text}")
        return
    config = recipes.get(name)
    content = to_json(config)
    for key in keys(config):
        node: Any = content
        for part in key.split("."):
            node = node[int(part)] if isinstance(node, (list, tuple)) else node[part]
        print(f"{key}={','.join(map(str, node)) if isinstance(node, (list, tuple)) else node}")
