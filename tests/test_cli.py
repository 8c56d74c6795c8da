"""The command: what a user's mistake looks like (one line, status 2, nothing left behind), and what commands print."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import largebatch
from largebatch.cli import main
from largebatch.experiments.console import RunDisplay, show_table
from largebatch.train import distributed

ASSETS = Path(largebatch.__file__).parent / "assets"


def failure(capsys, *arguments: str) -> str:
    """The one line that a wrong command prints."""
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    line = captured.err.rstrip("\n")
    assert line.startswith("largebatch: ")
    assert "\n" not in line
    assert "Traceback" not in line
    return line


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    paragraphs = [
        f"The {word} came in. It sat down by the {word}, and said nothing more." for word in ["cat", "dog", "owl"]
    ]
    (folder / "text.txt").write_text("\n\n".join(f"{p}\n{p} Number {i}." for i in range(60) for p in paragraphs))
    command = ["prepare", str(folder / "text.txt"), "--out", str(folder / "corpus"), "--vocab-size", "100"]
    assert main([*command, "--heldout", "0.2", "--workers", "1"]) == 0
    return folder / "corpus"


def test_prepare_reports_what_it_made(corpus, capsys):
    assert (corpus / "manifest.json").exists()


def test_prepare_refuses_bad_input(tmp_path, capsys):
    out = tmp_path / "out"
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("first line\ncaf\xe9\n".encode("latin-1"))
    (tmp_path / "lines.jsonl").write_text('{"text": "Fine."}\n{"body": "No text."}\n')
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n")
    (tmp_path / "good.txt").write_text("Some words. And more words.\n")
    cases = {
        "missing.txt": ["missing.txt"],
        "empty.txt": ["empty.txt", "empty"],
        "latin.txt": ["latin.txt", "line 2", "UTF-8"],
        "lines.jsonl": ["lines.jsonl", "line 2", "text"],
    }
    for name, expected in cases.items():
        line = failure(capsys, "prepare", tmp_path / name, "--out", out, "--workers", "1")
        assert all(part in line for part in expected), line
        assert not out.exists()
    line = failure(capsys, "prepare", tmp_path / "good.txt", "--out", out, "--vocab", tmp_path / "vocab.txt")
    assert "vocab.txt" in line
    assert "[MASK]" in line
    assert not out.exists()


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_damaged_shard_is_found_before_training(corpus, tmp_path, capsys, damage):
    shard = sorted((corpus / "train").glob("*"), key=lambda path: path.stat().st_size)[-1]
    content = shard.read_bytes()
    try:
        if damage == "cut":
            shard.write_bytes(content[:-1])
        else:
            shard.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        line = failure(capsys, "train", "bert-tiny", "--data", corpus, "--out", tmp_path / "run")
        assert shard.name in line
        assert not (tmp_path / "run").exists()
    finally:
        shard.write_bytes(content)


def test_train_refuses_bad_settings(corpus, tmp_path, capsys):
    run = tmp_path / "run"
    cases = {
        ("optim.lrr=1",): "the nearest is optim.lr",
        ("stages.0.batch_size=100", "stages.0.micro_batch_size=33"): "no multiple of the micro-batch 33",
        ("stages.0.warmup_steps=999999",): "stages.0: warmup_steps",
        ("optim.name=lamp",): "optim.name=lamp is not known",
        ("optim.lr=-1",): "lr",
        ("optim.momentum=0.5",): "optim.momentum has no effect on lamb",
        ("precision=fp64",): "precision is 'fp64'; it must be auto, fp32, bf16 or fp16",
        ("model.name=enormous",): "enormous",
        ("device=tpu",): "device is 'tpu'",
        ("stages.1.sequence_length=100000",): "100000",
        ("stages.0.sequence_length=4",): "stages.0.sequence_length is 4; it must be at least 5",
        ("stages.1.max_predictions=0",): "stages.1.max_predictions is 0; it must be at least 1",
        ("stages.0.batch_size=0",): "stages.0.batch_size is 0; it must be at least 1",
        ("stages.1.name=seq128",): "stages.1.name: 'seq128' is the name of stage 0 too; set another",
        ("data.masked_lm_probability=2",): "data.masked_lm_probability is 2.0; it must be in 0 to 1",
        ("data.short_sequence_probability=-1",): "data.short_sequence_probability is -1.0; it must be in 0 to 1",
        ("data.evaluation_sequences=0",): "data.evaluation_sequences is 0; it must be at least 1",
    }
    for settings, expected in cases.items():
        changes = [part for setting in settings for part in ("--set", setting)]
        line = failure(capsys, "train", "bert-tiny", "--data", corpus, "--out", run, *changes)
        assert expected in line, line
        assert not run.exists(), settings
    assert "the nearest is bert-tiny" in failure(capsys, "train", "bert-tinny", "--out", run)
    assert "largebatch prepare" in failure(capsys, "train", "bert-tiny", "--out", run)
    assert "no such" in failure(capsys, "train", "lenet-mnist", "--data", tmp_path / "nowhere", "--out", run)


def test_finetune_refuses_bad_settings(tmp_path, capsys):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"")
    command = [
        "finetune",
        "squad",
        "--model",
        weights,
        "--train",
        "a.json",
        "--test",
        "b.json",
        "--out",
        tmp_path / "r",
    ]
    cases = {
        ("--epochs", "0"): "epochs is 0.0; it must be a number above 0",
        ("--epochs", "-1"): "epochs is -1.0; it must be a number above 0",
        ("--epochs", "nan"): "epochs is nan; it must be a number above 0",
        ("--set", "stages.0.batch_size=0"): "stages.0.batch_size is 0; it must be at least 1",
        ("--set", "data.document_stride=0"): "data.document_stride is 0; it must be at least 1",
        ("--set", "data.max_query_length=0"): "data.max_query_length is 0; it must be at least 1",
        ("--set", "data.bad_answers=foo"): "data.bad_answers is 'foo'; it must be error or skip",
        ("--set", "init="): "init is not set; name a run of `largebatch train`, or a folder in Hugging Face's",
        ("--set", "data.max_sequence_length=4"): "data.max_sequence_length is 4; it must be at least 5",
        (): "model.safetensors/config.json cannot be read (Not a directory)",
    }
    for options, expected in cases.items():
        line = failure(capsys, *command, *options)
        assert expected in line, line
        assert not (tmp_path / "r").exists()


def test_a_file_is_no_folder_for_results(corpus, tmp_path, capsys, monkeypatch):
    """Found before a micro-batch is looked for, which can take minutes."""
    monkeypatch.setattr("largebatch.experiments.runner.find_micro_batch", lambda *_, **__: pytest.fail("too late"))
    file = tmp_path / "file"
    file.write_text("")
    for command in (
        ("train", "bert-tiny", "--data", corpus),
        ("profile", "bert-tiny", "--data", corpus),
        ("demo",),
    ):
        assert f"{file} is no folder; name another" in failure(capsys, *command, "--out", file)
        assert f"{file} is no folder; name another" in failure(capsys, *command, "--out", file / "run")
    assert f"is {file} a run directory?" in failure(capsys, "evaluate", file)


def test_cuda_that_is_not_there(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    line = failure(capsys, "train", "bert-tiny", "--data", corpus, "--out", tmp_path / "run", "--set", "device=cuda")
    assert "use --set device=cpu" in line


@pytest.mark.parametrize(
    ("launcher", "expected"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 but RANK is not set; start with torchrun, or unset WORLD_SIZE"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE is 2 but MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc' in the environment; it must be a whole number"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK is '-1' in the environment; it must be a whole number"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is 2 with WORLD_SIZE 2; it must be 0 to 1"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "x"},
            "MASTER_PORT is 'x' in the environment",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"},
            "rank 0 of 2 did not meet the others",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
            "rank 1 of 2 did not meet the others",
        ),
    ],
)
def test_a_launcher_that_says_half(corpus, tmp_path, capsys, monkeypatch, launcher, expected):
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    settings = ("--set", "device=cpu", "--set", "timeout_s=1")
    line = failure(capsys, "train", "bert-tiny", "--data", corpus, "--out", tmp_path / "run", *settings)
    assert expected in line


@pytest.mark.parametrize("launcher", [{"WORLD_SIZE": ""}, {"RANK": "abc"}, {"RANK": "1", "WORLD_SIZE": "1"}])
def test_a_rank_alone_is_the_first(monkeypatch, launcher):
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    assert distributed.is_chief()
    assert distributed.initialize("cpu").type == "cpu"
    assert distributed.world_size() == 1


def test_only_training_runs_on_many_ranks(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        for command in (["evaluate", str(tmp_path)], ["export", str(tmp_path)], ["plan", "gpt", "512"]):
            assert main(command) == (0 if rank == "1" else 2)
            assert ("runs in one process, rank 0's; rank 1 is idle" in capsys.readouterr().err) == (rank == "1")
        for command in (("train", "bert-tinny"), ("finetune", "squad")):
            assert "is idle" not in failure(capsys, *command)
    assert main(["train", "--list"]) == 0
    assert "bert-tiny" in capsys.readouterr().out
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert "bert-tiny" in failure(capsys, "train", "bert-tinny")  # which may be wrong on this rank alone
    assert waits == [5.0]
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert "bert, resnet50" in failure(capsys, "plan", "gpt", "512").replace("'", "")


def test_names_with_brackets_are_printed_as_they_are(capsys, monkeypatch):
    """Guards: Rich takes them for markup, drops them, or fails on one that closes nothing."""
    names = ["tiny[seed0]", "x[/b]", "a:cat:"]
    for name in names:
        show_table(name, ["", name], [[name, "1"]])
        printed = capsys.readouterr().out
        assert printed.count(name) == 3
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with RunDisplay(names[1]) as display:
        display.event(f"resuming {names[0]}")
        assert display._bar.columns[0].render(display._bar.tasks[0]).plain == names[1]
    assert f"resuming {names[0]}" in capsys.readouterr().out


def test_other_commands_refuse_bad_input(tmp_path, capsys):
    assert "run directory" in failure(capsys, "export", tmp_path)
    assert "name the model with --model" in failure(capsys, "finetune", "squad")
    assert "bert, resnet50" in failure(capsys, "plan", "gpt", "512").replace("'", "")
    assert "batch_size is '64k'; it must be a whole number" in failure(capsys, "plan", "bert", "64k")
    assert "it must be written without commas: 32768" in failure(capsys, "plan", "bert", "32,768")
    assert "name a run" in failure(capsys, "evaluate")
    assert f"there is no run in {tmp_path}/typo to resume" in failure(
        capsys, "train", "--resume", "--out", tmp_path / "typo"
    )
    assert f"there is no run in {tmp_path}/typo to resume" in failure(
        capsys, "finetune", "squad", "--resume", "--out", tmp_path / "typo"
    )
    failure(capsys, "report", tmp_path / "nothing")
    content = json.loads((ASSETS / "squad_extract" / "test.json").read_text())
    content["data"][0]["paragraphs"][0]["qas"][0]["answers"][0]["answer_start"] += 1
    (tmp_path / "bad.json").write_text(json.dumps(content))
    (tmp_path / "predictions.json").write_text("[]")
    line = failure(
        capsys,
        "evaluate",
        "--squad",
        ASSETS / "squad_extract" / "test.json",
        "--predictions",
        tmp_path / "predictions.json",
    )
    assert "predictions.json" in line


def test_two_small_batches_are_no_number_in_the_thousands(capsys):
    for batches in ("512,256", "256,512", "64,128"):
        assert main(["plan", "bert", batches]) == 0
        assert "seq512" in capsys.readouterr().out


def test_plan_prints_the_papers_run(capsys):
    assert main(["plan", "bert", "65536,32768"]) == 0
    text = capsys.readouterr().out
    assert "7,037" in text
    assert "1,562" in text
    assert "8,599" in text


def test_settings_of_a_recipe_are_listed_as_set_takes_them(capsys):
    assert main(["train", "lenet-mnist", "--list"]) == 0
    assert "optim.lr=0.004" in capsys.readouterr().out.splitlines()


def test_the_parser_imports_nothing_heavy():
    """`largebatch --help` answers at once: what a command needs is imported when it runs."""
    heavy = ("tokenizers", "rich", "matplotlib", "transformers")
    found = f"print(set({heavy}) & set(sys.modules))"
    code = f"import sys; from largebatch.cli import build_parser; build_parser(); {found}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_profile_tells_where_a_step_goes(corpus, tmp_path, capsys):
    settings = [f"stages.0.{key}" for key in ("batch_size=8", "micro_batch_size=4", "sequence_length=32", "steps=5")]
    settings += ["stages.0.warmup_steps=1", "device=cpu"]
    command = ["profile", "bert-tiny", "--data", str(corpus), "--out", str(tmp_path / "p"), "--steps", "2"]
    assert main([*command, *(part for setting in settings for part in ("--set", setting))]) == 0
    printed = capsys.readouterr().out
    for word in ("data", "forward", "backward", "reduction", "optimizer", "aten::", "tokens/s", "memory of a step"):
        assert word in printed
    assert "seq512" not in printed  # no micro-batch is sought for a stage that is not run
    events = json.loads((tmp_path / "p" / "trace.json").read_text())["traceEvents"]
    assert any(event.get("name") == "aten::mm" for event in events)


def test_profile_refuses_bad_input(corpus, tmp_path, capsys):
    assert "stages 0 to 1" in failure(capsys, "profile", "bert-tiny", "--data", corpus, "--stage", "2")
    # The steps that count, two before and a traced one are of one stage: there are more of the next.
    short = [f"stages.0.{key}" for key in ("batch_size=8", "micro_batch_size=4", "steps=4", "warmup_steps=1")]
    settings = [part for setting in (*short, "device=cpu") for part in ("--set", setting)]
    for steps in ("2", "9"):
        line = failure(capsys, "profile", "bert-tiny", "--data", corpus, "--steps", steps, *settings)
        assert f"--steps is {steps}; the stage ends before" in line
    for option in ("--steps", "--threads"):
        with pytest.raises(SystemExit, match="2"):
            main(["profile", "bert-tiny", "--data", str(corpus), option, "0"])
        assert f"argument {option}: '0' is not a whole number of at least 1" in capsys.readouterr().err
