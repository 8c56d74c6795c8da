"""`optimizer_in_backward` and `cpu_offload` change where and when a BERT is moved, and nothing else: the same bits.

Guards against a tied embedding that moves before all its uses are summed, checkpoints that only a run of the same kind
can go on from, and combinations that would be wrong in silence.
"""

import dataclasses
import itertools
import shutil
from pathlib import Path

import pytest
import torch

from largebatch.errors import UserError
from largebatch.experiments import runner
from largebatch.experiments.runner import run
from largebatch.train import checkpoint

from .conftest import small_bert
from .test_runs import lines

WHOLE = ["max_grad_norm=none", "stages.0.micro_batch_size=16", "stages.1.micro_batch_size=8"]


@pytest.fixture(scope="module")
def ordinary(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("memory") / "ordinary"
    run(small_bert(corpus, *WHOLE, "keep_checkpoints=9"), out)
    return out


def assert_same_run(out: Path, expected: Path) -> None:
    for name in ("loss", "lr", "samples"):
        assert [line[name] for line in lines(out, "step")] == [line[name] for line in lines(expected, "step")]
    norms = [[line["grad_norm"] for line in lines(run, "step")] for run in (out, expected)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)  # layer by layer, or at once
    for mine, theirs in zip(lines(out, "trust_ratios"), lines(expected, "trust_ratios"), strict=True):
        assert mine["ratios"] == theirs["ratios"]
    weights, theirs = (checkpoint.load_weights(checkpoint.latest(each / "checkpoints")) for each in (out, expected))
    assert all(torch.equal(weights[name], x) for name, x in theirs.items())


@pytest.mark.parametrize("option", ["optimizer_in_backward", "cpu_offload"])
def test_the_run_is_the_ordinary_one(corpus: Path, ordinary: Path, tmp_path: Path, option: str) -> None:
    run(small_bert(corpus, *WHOLE, f"{option}=true"), tmp_path / "run")
    assert_same_run(tmp_path / "run", ordinary)
    assert len(lines(tmp_path / "run", "trust_ratios")) > 1


@pytest.mark.parametrize("option", ["optimizer_in_backward", "cpu_offload"])
def test_a_run_goes_on_with_the_option_and_without(corpus: Path, ordinary: Path, tmp_path: Path, option: str) -> None:
    """The ordinary run's first steps, then some with the option, then the rest without."""
    out = tmp_path / "run"
    shutil.copytree(ordinary, out)
    for step, settings in ((2, [f"{option}=true"]), (6, [])):
        (out / "summary.json").unlink(missing_ok=True)
        for later in checkpoint.checkpoints(out / "checkpoints"):
            if int(later.name.removeprefix("step-")) > step:
                shutil.rmtree(later)
        run(small_bert(corpus, *WHOLE, "keep_checkpoints=9", *settings), out, resume=True)
    assert [line["step"] for line in lines(out, "resume")] == [2, 6]
    assert_same_run(out, ordinary)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["max_grad_norm=1"], "set max_grad_norm=none"),
        (["stages.1.micro_batch_size=4"], r"set stages\.1\.micro_batch_size=8, the whole batch of a rank"),
        (["cpu_offload=true"], "cannot go together"),
        (["optim.name=adamw"], "not finite, which adamw needs"),
    ],
)
def test_what_cannot_go_with_it_is_refused(corpus: Path, tmp_path: Path, settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(small_bert(corpus, *WHOLE, "optimizer_in_backward=true", *settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_fewer_ranks_take_larger_shares_in_the_backward_pass(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere micro-batches only become smaller; here a rank takes all of its share at once, which has grown."""
    saved = small_bert(corpus, "stages.0.micro_batch_size=8", "stages.1.micro_batch_size=4")  # of two ranks
    assert [stage.micro_batch_size for stage in runner._fit_to_ranks(saved).stages] == [8, 4]
    in_backward = dataclasses.replace(saved, optimizer_in_backward=True)
    assert [stage.micro_batch_size for stage in runner._fit_to_ranks(in_backward).stages] == [16, 8]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("max_grad_norm=0", r"max_grad_norm is 0\.0; it must be above 0, or none not to clip"),
        ("timeout_s=nan", "timeout_s is nan; it must be a number of seconds above 0"),
        ("keep_checkpoints=-1", "keep_checkpoints is -1; it must be at least 1, or none to keep all"),
        ("seed=18446744073709551616", r"seed is 18446744073709551616; it must fit into 64 bits"),
        ("evaluate_every=-1", "evaluate_every is -1; it must be a number of steps, or 0"),
    ],
)
def test_numbers_that_would_mean_something_else_are_refused(
    corpus: Path, tmp_path: Path, setting: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(small_bert(corpus, setting), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["lars", "adamw"])
def test_other_optimizers_are_offloaded(corpus: Path, tmp_path: Path, name: str) -> None:
    short = [f"stages.{stage}.{key}" for stage in (0, 1) for key in ("steps=1", "warmup_steps=0")]
    for option in ("true", "false"):
        run(small_bert(corpus, *short, f"optim.name={name}", f"cpu_offload={option}"), tmp_path / option)
    losses = [[line["loss"] for line in lines(tmp_path / option, "step")] for option in ("true", "false")]
    assert losses[0] == losses[1]
    assert all(a != b for a, b in itertools.pairwise(losses[0]))
