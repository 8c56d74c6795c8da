"""The record of what a run runs on: its command can be given again."""

import sys
from pathlib import Path

import pytest
import torch

from largebatch.train import hardware


@pytest.mark.parametrize(
    ("program", "command"),
    [
        ("/venv/bin/largebatch", "largebatch train bert-tiny --out 'my run' --set 'data.path=a b'"),
        ("/venv/lib/largebatch/__main__.py", "largebatch train bert-tiny --out 'my run' --set 'data.path=a b'"),
        ("sweep.py", "sweep.py train bert-tiny --out 'my run' --set 'data.path=a b'"),
    ],
    ids=["script", "module", "another program"],
)
def test_the_command_can_be_given_again(program: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m` and torchrun put the module's file in the place of the command."""
    arguments = ["train", "bert-tiny", "--out", "my run", "--set", "data.path=a b"]
    monkeypatch.setattr(sys, "argv", [str(Path(program)), *arguments])
    assert hardware.describe(torch.device("cpu"), "")["command"] == command
