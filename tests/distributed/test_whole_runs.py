"""A run is the same run on 1, 2 and 4 ranks, under every sharding and however its batches are cut; so is its resume.

Guards against samples, masks or dropout that depend on who computes them, and against checkpoints that only the ranks
that wrote them can read. BERT with dropout, two stages, 50 steps; see whole_runs.py.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import whole_runs
from whole_runs import final_weights, metrics, settings

import largebatch
from largebatch.cli import main
from largebatch.experiments.config import override
from largebatch.experiments.recipes import get
from largebatch.experiments.runner import build_workload
from largebatch.experiments.transfer import export_to_hf
from largebatch.train import distributed

QUESTIONS = Path(largebatch.__file__).parent / "assets" / "squad_extract" / "train.json"
PROGRAM = Path(__file__).with_name("whole_runs.py")

pytestmark = pytest.mark.timeout(600)  # seconds; under half a minute on two idle cores

# 50 steps of a float32 network, each off by some 1e-7 in a sum taken in another order, and LAMB's division by a root
# of the mean square, which is as large as the gradient at first.
RTOL = 1e-5

NAMES = ["2, fsdp", "4, ddp", "4, ddp, then 1", "4, ddp, then 2, fsdp", "2, fsdp, then 4, hsdp"]


def on_ranks(cases: list[dict[str, Any]], folder: Path) -> None:
    environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **os.environ}
    command = [sys.executable, str(PROGRAM), str(folder), json.dumps(cases, default=str)]
    finished = subprocess.run(command, env=environment, timeout=560, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-4000:]


@pytest.fixture(scope="module")
def many(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same run on several ranks, by name; and two that go on from the 20th step of one of them."""
    folder = tmp_path_factory.mktemp("many")
    eights = ["stages.0.micro_batch_size=8", "stages.1.micro_batch_size=2"]
    fours = ["stages.0.micro_batch_size=4", "stages.1.micro_batch_size=1"]
    outs = {name: folder / name.replace(", ", "-").replace(" ", "-") for name in (*NAMES, "stopped")}
    cases = [
        {"ranks": 2, "out": outs["2, fsdp"], "chosen": settings(corpus, "sharding=fsdp", *eights)},
        {"ranks": 4, "out": outs["4, ddp"], "chosen": settings(corpus, *fours)},
        {"ranks": 2, "out": outs["stopped"], "chosen": settings(corpus, *eights), "stop_after": 3},
    ]
    on_ranks(cases, folder / "whole")
    go_on_after_20(outs["4, ddp"], outs["4, ddp, then 1"])
    go_on_after_20(outs["4, ddp"], outs["4, ddp, then 2, fsdp"])
    go_on_after_20(outs["2, fsdp"], outs["2, fsdp, then 4, hsdp"])
    cases = [
        {"ranks": 2, "out": outs["4, ddp, then 2, fsdp"], "chosen": settings(corpus, "sharding=fsdp")},
        {"ranks": 4, "out": outs["2, fsdp, then 4, hsdp"], "chosen": settings(corpus, "sharding=hsdp")},
    ]
    on_ranks([{**case, "resume": True} for case in cases], folder / "resumed")
    whole_runs.train(outs["4, ddp, then 1"], settings(corpus), resume=True)
    return outs


def go_on_after_20(run: Path, out: Path) -> None:
    """Copy a run as if it had been killed after its checkpoint at step 20."""
    shutil.copytree(run, out)
    (out / "summary.json").unlink()
    for later in sorted((out / "checkpoints").iterdir()):
        if later.name != "step-00000020":
            shutil.rmtree(later)


def assert_same_run(out: Path, expected: Path) -> None:
    got, wanted = metrics(out), metrics(expected)
    assert [line["step"] for line in got] == list(range(1, 51))
    for mine, theirs in zip(got, wanted, strict=True):
        for name in ("loss", "mlm_loss", "nsp_loss"):
            assert mine[name] == pytest.approx(theirs[name], rel=RTOL), f"{name} at step {mine['step']}"
        for name in ("samples", "lr", "stage"):
            assert mine[name] == theirs[name]
    for mine, theirs in zip(metrics(out, "eval"), metrics(expected, "eval"), strict=True):
        assert mine["mlm_loss"] == pytest.approx(theirs["mlm_loss"], rel=RTOL)


@pytest.mark.parametrize("name", NAMES)
def test_the_number_of_ranks_does_not_change_the_run(many: dict[str, Path], alone: Path, name: str) -> None:
    assert_same_run(many[name], alone)
    assert metrics(alone)[0]["loss"] > metrics(alone)[39]["loss"] + 0.1  # it did learn something
    if "then" in name:
        assert [line["step"] for line in metrics(many[name], "resume")] == [20]
    weights, expected = final_weights(many[name]), final_weights(alone)
    assert weights.keys() == expected.keys()
    for key, x in expected.items():  # the biases of the keys have no gradient but rounding
        assert float((weights[key] - x).abs().max() / x.abs().max()) < 1e-3 or key.endswith("key.bias"), key


def test_ranks_agree_on_the_step_to_stop_at(many: dict[str, Path]) -> None:
    """One rank had the signal after step 3; both finish step 4, which tells them all, and write a checkpoint."""
    assert [line["step"] for line in metrics(many["stopped"])] == [1, 2, 3, 4]
    assert [path.name for path in (many["stopped"] / "checkpoints").iterdir()] == ["step-00000004"]


def test_fine_tuning_is_the_same_run_too(alone: Path, tmp_path: Path) -> None:
    """From a run's checkpoint, with its dropout; a batch's windows are dealt to the ranks by length."""
    content = json.loads(QUESTIONS.read_text())
    content["data"] = [{**content["data"][0], "paragraphs": content["data"][0]["paragraphs"][:3]}]
    questions = tmp_path / "questions.json"
    questions.write_text(json.dumps(content))
    chosen = [f"init={alone}", f"data.train={questions}", f"data.test={questions}", "device=cpu", "timeout_s=60"]
    chosen += [
        "precision=fp32",
        "stages.0.batch_size=8",
        "stages.0.steps=6",
        "stages.0.micro_batch_size=4",
        "optim.lr=1e-3",
    ]
    whole_runs.train(tmp_path / "one", chosen, recipe="squad-demo")
    case = {"ranks": 2, "out": tmp_path / "two", "chosen": [*chosen, "sharding=fsdp"], "recipe": "squad-demo"}
    on_ranks([case], tmp_path / "ranks")
    losses = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=RTOL)
    assert losses[0][0] > losses[0][-1]
    scores = [metrics(tmp_path / name, "eval")[-1]["f1"] for name in ("one", "two")]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)


def test_torch_s_own_dropout_would_be_seen(corpus: Path, tmp_path: Path) -> None:
    """The companion: masks from a generator change with the micro-batch, and the losses with them."""
    short = ["dropout_masks=torch", "stages.0.steps=2", "stages.0.warmup_steps=0", "stages.1.steps=1"]
    short += ["stages.1.warmup_steps=0", "data.evaluation_sequences=1"]
    whole_runs.train(tmp_path / "one", settings(corpus, *short))
    whole_runs.train(tmp_path / "other", settings(corpus, *short, "stages.0.micro_batch_size=4"))
    losses = [metrics(tmp_path / name)[0]["loss"] for name in ("one", "other")]
    assert losses[0] != pytest.approx(losses[1], rel=10 * RTOL)


def test_ranks_share_a_batch_without_gap_or_overlap(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The very samples, masked positions, labels and dropout keys of one process, in its order."""
    config = override(get("bert-tiny"), settings(corpus, "dropout_masks=keyed", "stages.0.micro_batch_size=2"))

    def shares(world_size: int) -> list[torch.Tensor]:
        arrays: dict[str, list[torch.Tensor]] = {}
        for rank in range(world_size):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            monkeypatch.setattr(distributed, "world_size", lambda: world_size)
            batches = build_workload(config).batches(0, {"stage": 0, "epoch": 0, "position": 5})
            for batch in (next(batches), next(batches)):
                for part in batch.micro_batches:
                    arrays.setdefault(f"{batch.cursor} input_ids", []).append(part["input_ids"])
                    for name in ("masked_labels", "next_sentence_labels", "dropout_keys"):
                        arrays.setdefault(f"{batch.cursor} {name}", []).append(part[name])
        return [torch.cat(parts) for parts in arrays.values()]

    whole = shares(1)
    assert len(whole) == 8
    for world_size in (2, 4, 8):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(shares(world_size), whole, strict=True))
    keys = torch.cat([whole[3], whole[7]])
    assert len(keys.unique()) == 32  # no two visits share a key


def test_evaluation_waits_for_no_other_rank(alone: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """In a shell where a job's manager has exported the ranks of its own."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: pytest.fail("it waits"))
    assert main(["evaluate", str(alone)]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["mlm_loss"] == pytest.approx(metrics(alone, "eval")[-1]["mlm_loss"], rel=RTOL)


@pytest.mark.parametrize("name", ["4, ddp, then 1", "4, ddp, then 2, fsdp", "2, fsdp, then 4, hsdp"])
def test_a_resumed_run_is_exported_for_transformers(many: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Whatever ranks its last checkpoint was written by."""
    transformers = pytest.importorskip("transformers")
    export_to_hf(many[name], tmp_path / "hf")
    model = transformers.BertForPreTraining.from_pretrained(tmp_path / "hf")
    loaded = model.state_dict()
    for key, x in final_weights(many[name]).items():
        assert torch.equal(loaded[key], x), key
