"""The run directory: lines appended, a resumed run's tail dropped, JSON written whole."""

import errno
import json
from pathlib import Path

import pytest

from largebatch.errors import UserError
from largebatch.train.metrics import RunDirectory, check_folder, read_json, write_json


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_each_event_is_a_line(tmp_path: Path):
    run = RunDirectory(tmp_path / "run")
    run.log("step", step=1, loss=2.5)
    run.log("eval", step=1, f1=80.0)
    assert lines(run.path) == [{"event": "step", "step": 1, "loss": 2.5}, {"event": "eval", "step": 1, "f1": 80.0}]


def test_a_resume_drops_what_it_will_write_again(tmp_path: Path):
    run = RunDirectory(tmp_path)
    for step in range(1, 6):
        run.log("step", step=step)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"event": "step", "st')  # the process was killed here
    run.rewind(3)
    run.log("resume", step=3)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 3]


def test_other_ranks_write_nothing(tmp_path: Path):
    run = RunDirectory(tmp_path / "run", write=False)
    run.log("step", step=1)
    run.write_json("config.json", {})
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_the_numbers(tmp_path: Path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = RunDirectory(tmp_path)
    run.use_tensorboard()
    run.log("step", step=1, loss=2.5, clipped=True, stage="seq128")
    run.log("trust_ratios", step=1, ratios={"a.weight": 0.5})
    run.log("step", step=2, loss=2.4)
    run.close()
    resumed = RunDirectory(tmp_path)
    resumed.use_tensorboard(1)  # killed after step 2, with a checkpoint of step 1
    resumed.log("step", step=2, loss=2.3)
    resumed.close()
    read = events.EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert read.Tags()["scalars"] == ["step/loss", "trust_ratios/a.weight"]
    assert [(at.step, at.value) for at in read.Scalars("step/loss")] == [(1, 2.5), (2, pytest.approx(2.3))]


def test_one_process_at_a_time_has_the_folder(tmp_path: Path, monkeypatch):
    first, second = RunDirectory(tmp_path), RunDirectory(tmp_path)
    assert first.lock()
    assert not second.lock()
    second.close()
    assert RunDirectory(tmp_path, write=False).lock()
    first.close()
    assert second.lock()

    def no_locks(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    assert first.lock()
    monkeypatch.setattr("largebatch.train.metrics.fcntl", None)
    assert first.lock()
    first.close()
    second.close()


def test_a_json_file_that_cannot_be_written_leaves_the_one_before(tmp_path: Path, monkeypatch):
    write_json(tmp_path / "config.json", {"seed": 1})
    whole = Path.write_text

    def half(path: Path, text: str) -> None:
        whole(path, text[:4])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "config.json", {"seed": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert read_json(tmp_path / "config.json") == {"seed": 1}


@pytest.mark.parametrize(
    ("content", "message"), [(None, "does not exist"), ("{", "is not JSON"), ("[1]", "is not a JSON object")]
)
def test_a_missing_or_broken_file_is_named(tmp_path: Path, content, message):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=f"config.json {message}"):
        read_json(path)


def test_a_file_where_a_folder_should_be_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/config\.json cannot be read \(Not a directory\); is .*file a run"):
        read_json(tmp_path / "file" / "config.json")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=rf"{path} cannot be made: .*file is no folder; name another"):
            RunDirectory(path)
    RunDirectory(tmp_path / "file", write=False)


def test_a_folder_that_may_not_be_written_is_found_before_anything_is_made(tmp_path: Path, monkeypatch):
    check_folder(tmp_path / "new" / "run")
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    with pytest.raises(UserError, match=f"run cannot be written: there is no permission for {tmp_path}; name another"):
        check_folder(tmp_path / "new" / "run")
    assert not (tmp_path / "new").exists()
