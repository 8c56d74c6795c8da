"""The demo as one command that may be stopped, be taken up again with its settings, and fail in one line."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from largebatch.cli import main
from largebatch.experiments import demo

from .conftest import SMALL


@pytest.fixture
def command(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A demo of a small corpus and model."""
    monkeypatch.setattr(demo, "prepare", lambda inputs, out, **_: shutil.copytree(corpus, out))
    monkeypatch.setattr(demo, "render_report", lambda manifest: "")
    return ["demo", "--out", str(tmp_path / "demo")]


def test_a_demo_that_is_stopped_goes_on_with_its_settings(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [part for setting in (*SMALL, "keep_checkpoints=7") for part in ("--set", setting)]
    monkeypatch.setattr(demo.RunDisplay, "step", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    for more in (settings, [], settings):
        assert main([*command, *more]) == 130
        assert capsys.readouterr().err == "largebatch: stopped; the same command goes on from here\n"
    run = tmp_path / "demo" / "pretraining"
    assert json.loads((run / "config.json").read_text())["keep_checkpoints"] == 7
    assert len(list((run / "checkpoints").iterdir())) == 3
    assert main([*command, "--set", "seed=1"]) == 2
    assert "leave seed=1 out" in capsys.readouterr().err


def test_a_demo_that_diverges_is_one_line(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    settings = [*SMALL, "stages.0.steps=20", "stages.0.warmup_steps=0", "optim.lr=1e30"]
    assert main([*command, *(part for setting in settings for part in ("--set", setting))]) == 1
    line = capsys.readouterr().err
    assert line.startswith("largebatch: training diverged")
    assert line.count("\n") == 1


@pytest.mark.parametrize(
    ("setting", "message"), [("optim.name=lamp", "optim.name=lamp is not known"), ("stages.0.steps=0", "is 0; it must")]
)
def test_settings_are_checked_before_minutes_are_spent(
    setting: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "prepare", lambda *_, **__: pytest.fail("too late"))
    assert main(["demo", "--out", str(tmp_path / "demo"), "--set", setting]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()
