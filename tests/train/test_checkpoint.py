"""Checkpoints: whole or not at all, and another model's are refused in one line."""

from pathlib import Path

import pytest
import torch
from torch import nn

from largebatch import LAMB
from largebatch.errors import UserError
from largebatch.train import Progress, checkpoint


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


def test_a_save_that_fails_leaves_the_old_one_and_no_half(tmp_path: Path, monkeypatch):
    model, optimizer = trained()
    checkpoint.save(tmp_path, model, optimizer, Progress(step=1))

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path, model, optimizer, Progress(step=2))
    assert checkpoint.latest(tmp_path).name == "step-00000001"


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
    content = (saved / "model.pt").read_bytes()
    (saved / "model.pt").write_bytes(content[:-10])
    with pytest.raises(UserError, match=r"model.pt is damaged: \d+ bytes of \d+"):
        checkpoint.load(saved, model, optimizer)
    (saved / "model.pt").write_bytes(bytes(len(content)))
    with pytest.raises(UserError, match=r"model.pt cannot be read"):
        checkpoint.load(saved, model, optimizer)


@pytest.mark.parametrize("content", [None, "{", '{"version": 1}', '{"version": 99, "files": {}}'])
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, content):
    if content is not None:
        (tmp_path / "checkpoint.json").write_text(content)
    with pytest.raises(UserError, match=r"is no checkpoint of largebatch|has checkpoint format 99"):
        checkpoint.load(tmp_path, *trained())
