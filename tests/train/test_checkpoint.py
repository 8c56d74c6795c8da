"""Checkpoints: whole or not at all, and another model's are refused in one line."""

import errno
import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from largebatch import LAMB
from largebatch.errors import UserError
from largebatch.train import Progress, checkpoint, distributed


def trained(width: int = 4) -> tuple[nn.Module, LAMB]:
    model = nn.Linear(3, width)
    optimizer = LAMB(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_what_was_saved_comes_back(tmp_path: Path):
    model, optimizer = trained()
    progress = Progress(3, 1, 2, 96, 1000, 1.5, {"epoch": 0, "position": 96})
    saved = checkpoint.save(tmp_path, model, optimizer, progress)
    other = nn.Linear(3, 4)
    other_optimizer = LAMB(other.parameters())
    assert checkpoint.load(saved, other, other_optimizer) == progress
    assert torch.equal(other.weight, model.weight)
    for mine, theirs in zip(optimizer.state.values(), other_optimizer.state.values(), strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_only_the_newest_are_kept(tmp_path: Path):
    model, optimizer = trained()
    for step in (1, 2, 10):
        checkpoint.save(tmp_path, model, optimizer, Progress(step=step), keep=2)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000002", "step-00000010"]
    assert checkpoint.latest(tmp_path).name == "step-00000010"


@pytest.mark.parametrize("keep", [0, -1])
def test_to_keep_none_is_refused(tmp_path: Path, keep: int):
    with pytest.raises(ValueError, match=f"keep={keep}: expected at least 1, or None"):
        checkpoint.save(tmp_path, *trained(), Progress(step=1), keep=keep)
    assert not any(tmp_path.iterdir())


def test_what_a_killed_run_left_behind_goes(tmp_path: Path):
    (tmp_path / ".partial-step-00000003").mkdir()
    (tmp_path / ".partial-step-00000003" / "__0_0.distcp").write_bytes(b"half")
    saved = checkpoint.save(tmp_path, *trained(), Progress(step=4))
    assert list(tmp_path.iterdir()) == [saved]


def test_a_save_that_fails_leaves_the_old_one_and_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, optimizer = trained()
    kept = checkpoint.save(tmp_path, model, optimizer, Progress(step=1), keep=1)

    def full(files: object, *args: object, **kwargs: object) -> None:
        with open(tmp_path / ".partial-step-00000002" / "__0_0.distcp", "wb") as file:
            file.write(b"half")
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 704 vs 598")  # noqa: B904  # as torch's writer does

    monkeypatch.setattr("torch.distributed.checkpoint.FileSystemWriter.write_data", full)
    with pytest.raises(UserError, match=r"step-00000002 cannot be written \(.*No space left on device\); make room"):
        checkpoint.save(tmp_path, model, optimizer, Progress(step=2), keep=1)
    assert list(tmp_path.iterdir()) == [kept]
    assert checkpoint.load(kept, model, optimizer).step == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError("std::bad_alloc"), RuntimeError("CUDA error")])
def test_what_is_no_fault_of_the_disk_stays_what_it_is(error: BaseException, tmp_path: Path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("torch.distributed.checkpoint.FileSystemWriter.write_data", fail)
    with pytest.raises(type(error)):
        checkpoint.save(tmp_path, *trained(), Progress(step=2))


class Counting(torch.optim.Optimizer):
    """Momentum whose step counts are plain numbers, in the state and in the group, as some keep them."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})
        for group in self.param_groups:
            group["k"] = 0

    def step(self):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            group["k"] += 2
            for x in group["params"]:
                state = self.state[x]
                state["step"] = state.get("step", 0) + 1
                state["m"] = state.get("m", 0) + x.grad


def test_an_optimizers_plain_numbers_come_back(tmp_path: Path):
    model = nn.Linear(3, 4)
    optimizer, other = Counting(model.parameters()), Counting(model.parameters())
    for _ in range(3):
        model.zero_grad()
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    checkpoint.load(checkpoint.save(tmp_path, model, optimizer, Progress(step=3)), model, other)
    assert [(group["step"], group["k"]) for group in other.param_groups] == [(3, 6)]
    for x, state in optimizer.state.items():
        assert other.state[x]["step"] == 3
        assert torch.equal(other.state[x]["m"], state["m"])


def test_what_no_checkpoint_can_hold_is_refused(tmp_path: Path):
    model, optimizer = trained()
    optimizer.state[model.weight]["history"] = [1, 2]
    with pytest.raises(UserError, match="no checkpoint can hold the optimizer's 'history' of weight, list"):
        checkpoint.save(tmp_path, model, optimizer, Progress(step=1))


def test_a_checkpoint_of_another_optimizer_changes_nothing(tmp_path: Path):
    model, _ = trained()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sgd.step()
    saved = checkpoint.save(tmp_path, model, sgd, Progress(step=1))
    other, optimizer = trained()
    before = {key: x.clone() for key, x in optimizer.state[other.weight].items()}
    weight = other.weight.clone()
    with pytest.raises(UserError, match=r"step-00000001 does not fit the optimizer: state_dict="):
        checkpoint.load(saved, other, optimizer)
    assert torch.equal(other.weight, weight)
    assert all(torch.equal(x, before[key]) for key, x in optimizer.state[other.weight].items())


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path):
    saved = checkpoint.save(tmp_path, *trained(), Progress(step=1))
    model, optimizer = trained(width=5)
    before = model.weight.clone()
    with pytest.raises(UserError, match=r"another model: (weight|bias) is \[4.*\[5"):
        checkpoint.load(saved, model, optimizer)
    assert torch.equal(model.weight, before)
    with pytest.raises(UserError, match="the checkpoint has no 0"):
        checkpoint.load(saved, nn.Sequential(nn.Linear(3, 4)), None)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path):
    model, optimizer = trained()
    saved = checkpoint.save(tmp_path, model, optimizer, Progress(step=1))
    for name in ("__0_0.distcp", ".metadata"):
        content = (saved / name).read_bytes()
        (saved / name).write_bytes(content[:-10])
        with pytest.raises(UserError, match=rf"{name} is damaged: \d+ bytes of \d+"):
            checkpoint.load(saved, model, optimizer)
        (saved / name).write_bytes(bytes(len(content)))
        before = model.weight.clone()
        with pytest.raises(UserError, match=r"step-00000001 cannot be read \("):
            checkpoint.load(saved, model, optimizer)
        assert torch.equal(model.weight, before)
        (saved / name).write_bytes(content)
    checkpoint.load(saved, model, optimizer)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("touched"),))


def test_a_checkpoint_of_a_stranger_runs_no_code(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, optimizer = trained()
    saved = checkpoint.save(tmp_path, model, optimizer, Progress(step=1))
    evil = pickle.dumps(Evil())
    (saved / ".metadata").write_bytes(evil)
    manifest = json.loads((saved / "checkpoint.json").read_text())
    manifest["files"][".metadata"] = len(evil)
    (saved / "checkpoint.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"pathlib.Path.touch, which is no part|builtins.getattr, which is no part"):
        checkpoint.load(saved, model, optimizer)
    assert not Path("touched").exists()
    pickle.loads(evil)  # the companion
    assert Path("touched").exists()


def test_tied_weights_are_written_once_and_come_back_by_every_name(tmp_path: Path):
    model = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 7, bias=False))
    model[1].weight = model[0].weight
    saved = checkpoint.save(tmp_path, model, LAMB(model.parameters()), Progress(step=1))
    weights = checkpoint.load_weights(saved)
    assert weights.keys() == model.state_dict().keys()
    assert torch.equal(weights["1.weight"], model[0].weight)
    assert list(distributed.stored_tensors(saved)) == ["model.0.weight"]


@pytest.mark.parametrize("content", [None, "{", '{"version": 1}', '{"version": 99, "files": {}}'])
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, content):
    if content is not None:
        (tmp_path / "checkpoint.json").write_text(content)
    with pytest.raises(UserError, match=r"is no checkpoint of largebatch|has checkpoint format 99"):
        checkpoint.load(tmp_path, *trained())
