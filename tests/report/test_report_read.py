"""Reading run directories: what a report must bear (a run going on, resumed, crashed, of another version) and what it
must refuse with one line that says what is wrong, where, and what to do."""

import errno
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import synthetic

from largebatch.errors import UserError
from largebatch.report.read import Run, read_runs

ONE_STAGE = (("only", 128, 32, 20, 1e-3, 2),)


def read(folder: Path) -> Run:
    return read_runs([folder])[0]


def rewrite(folder: Path, change: Callable[[list[str]], list[str]]) -> Run:
    """Change the lines of metrics.jsonl and read the run."""
    path = folder / "metrics.jsonl"
    path.write_text("\n".join(change(path.read_text().splitlines())))
    return read(folder)


def test_a_complete_run(tmp_path: Path) -> None:
    run = read(synthetic.write_run(tmp_path / "bert"))
    assert run.name == "bert"
    assert (run.kind, run.recipe, run.complete, run.notes) == ("pretraining", "bert-tiny", True, [])
    assert run.num_steps == run.planned_steps == 500
    assert run.steps["step"] == list(range(1, 501))
    assert [(s.name, s.first, s.last) for s in run.stages] == [("seq128", 1, 450), ("seq512", 451, 500)]
    assert run.boundaries == [(450.5, "seq128", "seq512")]
    assert run.wall_s == pytest.approx(run.steps["time_s"][-1])
    assert run.ratios.steps == [1, *range(10, 501, 10)]
    assert set(run.ratios.rows) == set(synthetic.bert_layers(2))
    assert {e.split for e in run.evaluations} == {"heldout"}
    assert set(run.evaluations[0].values) == {"mlm_loss", "mlm_accuracy", "nsp_loss", "nsp_accuracy"}


def test_a_run_in_progress_says_how_far_it_is(tmp_path: Path) -> None:
    run = read(synthetic.write_run(tmp_path / "bert", stop_at=123))
    assert not run.complete
    assert run.notes == ["The run is not complete (no summary.json yet): 123 of 500 steps are recorded."]
    assert run.stages[1].first is None


def test_a_last_line_cut_short_is_left_out_and_noted(tmp_path: Path) -> None:
    folder = synthetic.write_run(tmp_path / "bert", stages=ONE_STAGE, stop_at=15)
    whole = read(folder)
    cut = rewrite(folder, lambda lines: [*lines[:-1], lines[-1][:40]])
    assert cut.num_steps == whole.num_steps - 1
    assert any("last line of metrics.jsonl is cut short" in note for note in cut.notes)
    assert not any("cut short" in note for note in whole.notes)


def test_a_bad_line_inside_is_noted_with_its_number(tmp_path: Path) -> None:
    folder = synthetic.write_run(tmp_path / "bert")
    run = rewrite(folder, lambda lines: [*lines[:10], '{"event": "st', "\x00\x00", *lines[10:]])
    assert run.num_steps == 500
    assert any("left out: 11, 12" in note for note in run.notes)


def test_a_file_that_is_no_log_is_refused(tmp_path: Path) -> None:
    folder = synthetic.write_run(tmp_path / "bert", stages=ONE_STAGE)
    with pytest.raises(UserError, match=r"metrics\.jsonl line 1 is not JSON, nor are 19 more"):
        rewrite(folder, lambda lines: ["step 1 loss 9.0"] * 20)


def test_unknown_events_keys_and_values_change_nothing(tmp_path: Path) -> None:
    folder = synthetic.write_run(tmp_path / "bert", stages=ONE_STAGE)
    before = read(folder)
    strange = [
        {"event": "gpu_memory", "step": 3, "bytes": 1},
        {"event": "step", "step": "three", "loss": 1.0},
        {"event": "step"},
        {"event": "trust_ratios", "step": 3, "ratios": [1, 2]},
        {"event": "eval", "step": None},
        ["step", 3],
        7,
    ]
    after = rewrite(folder, lambda lines: [*lines, *map(json.dumps, strange)])
    assert after == before


def test_a_resume_discards_what_it_repeats(tmp_path: Path) -> None:
    """A run killed at step 20 that resumes after step 15 writes 16 to 20 again: each step must count once, with the
    values of the later session, and no evaluation or ratio of the discarded stretch may stay."""
    folder = synthetic.write_run(tmp_path / "bert", stages=ONE_STAGE, evaluate_every=19, ratios_every=18)

    def resume(lines: list[str]) -> list[str]:
        again = [{"event": "step", "step": step, "stage": "only", "loss": 1.0} for step in (16, 17)]
        return [*lines, json.dumps({"event": "resume", "step": 15}), *map(json.dumps, again)]

    assert read(folder).evaluations
    run = rewrite(folder, resume)
    assert run.steps["step"] == list(range(1, 18))
    assert run.steps["loss"][-2:] == [1.0, 1.0]
    assert run.steps["loss"][14] != 1.0
    assert run.evaluations == []
    assert run.ratios.steps == [1]
    assert run.resumes == [15]
    assert "Training was resumed after step 15." in run.notes


def test_losses_that_are_not_finite_are_counted(tmp_path: Path) -> None:
    run = read(synthetic.write_run(tmp_path / "bert", diverge_at=100))
    assert "The loss is not finite in 371 of 500 steps, first at step 130." in run.notes
    assert any(note.startswith("371 steps left the weights alone") for note in run.notes)
    assert math.isnan(run.steps["loss"][-1])


@pytest.mark.parametrize("log", ["empty", "missing"])
def test_a_run_without_steps_or_environment_is_still_a_run(tmp_path: Path, log: str) -> None:
    """The log is there from the first event on, the configuration before."""
    folder = synthetic.write_run(tmp_path / "bert", stages=ONE_STAGE, stop_at=0)
    (folder / "metrics.jsonl").unlink()
    if log == "empty":
        (folder / "metrics.jsonl").write_text("")
    (folder / "env.json").unlink()
    run = read(folder)
    assert run.num_steps == 0
    assert "No step is recorded yet." in run.notes
    assert any("env.json is missing" in note for note in run.notes)


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [synthetic.write_run(tmp_path / seed / "bert", stages=ONE_STAGE) for seed in ("a", "b")]
    assert [run.name for run in read_runs(folders)] == ["a/bert", "b/bert"]
    assert [run.name for run in read_runs(folders[:1])] == ["bert"]


def test_a_name_that_is_not_utf_8_is_spelled_out(tmp_path: Path) -> None:
    folder = synthetic.write_run(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")), stages=ONE_STAGE)
    assert read(folder).name == r"caf\xe9"


@pytest.mark.parametrize("name", ["config.json", "env.json", "summary.json", "metrics.jsonl"])
def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = synthetic.write_run(tmp_path / "bert", stages=ONE_STAGE)
    read_bytes = Path.read_bytes

    def locked(path: Path) -> bytes:
        if path.name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", locked)
    with pytest.raises(UserError, match=rf"bert/{name} cannot be read \(Permission denied\)"):
        read(folder)


def spoil(folder: Path, case: str) -> list[Path]:
    """Make `folder` the bad input that `case` names; returns the arguments."""
    match case:
        case "nothing given":
            return []
        case "given twice":
            return [folder, folder / "." / "checkpoints" / ".."]
        case "no such folder":
            return [folder / "nowhere"]
        case "a file":
            return [folder / "config.json"]
        case "no run":
            return [folder.parent]
        case "a model's folder":
            (folder / "metrics.jsonl").unlink()
            (folder / "config.json").write_text('{"model_type": "bert"}')
        case "broken config":
            (folder / "config.json").write_text('{"kind":')
        case "config is a list":
            (folder / "config.json").write_text("[1]")
        case "summary is not text":
            (folder / "summary.json").write_bytes(b"\xff\xfe\x00")
    return [folder]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("nothing given", "name at least one"),
        ("given twice", "given twice"),
        ("no such folder", "nowhere is no directory; give a run directory"),
        ("a file", r"config\.json is no directory; give a run directory"),
        ("no run", r"has no config\.json; give a run directory"),
        ("a model's folder", "bert holds no run; give a run directory"),
        ("broken config", r"config\.json is not JSON \(.*line 1.*\); restore it"),
        ("config is a list", r"config\.json holds list, not a JSON object; restore it"),
        ("summary is not text", r"summary\.json is not JSON"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path: Path, case: str, message: str) -> None:
    folder = synthetic.write_run(tmp_path / "bert", stages=ONE_STAGE)
    (folder / "checkpoints").mkdir()
    with pytest.raises(UserError, match=message) as caught:
        read_runs(spoil(folder, case))
    assert "\n" not in str(caught.value)
