"""The benchmarks measure what they say: the models' shapes, ratios to the unit, and figures that can be read again."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from largebatch.bench import optim, peers, timing
from largebatch.cli import main

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("model", "tensors", "millions"),
    [("bert-base", 206, 110.1), ("bert-large", 398, 336.2), ("resnet-50", 161, 25.6), ("2000x1000", 2000, 2.0)],
)
def test_the_shapes_are_the_models(model: str, tensors: int, millions: float) -> None:
    shapes = peers.shapes_of(model)
    assert len(shapes) == tensors
    assert sum(torch.Size(shape).numel() for shape in shapes) / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "shapes_of", lambda model: [(40, 30), (7,)])
    monkeypatch.setattr(timing, "copy_bytes_per_s", lambda device: 1e10)
    monkeypatch.setattr(optim, "copy_bytes_per_s", lambda device: 1e10)


def test_every_contender_is_beside_the_unit(small: None, tmp_path: Path) -> None:
    said: list[str] = []
    rows = optim.bench_optim(["bert-base"], CPU, rounds=2, say=said.append)
    named = {row["name"]: row for row in rows}
    assert rows[0]["name"] == peers.UNIT
    assert {"largebatch LAMB", "largebatch LARS", "torch AdamW foreach"} <= named.keys()
    for row in rows:
        assert row["ratio"] > 0
        assert row["parameters"] == 1207
    assert len(named) + len(said) == len(peers.contenders(CPU, compiled=False))
    assert all("not installed" in line for line in said)
    optim.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    timing.write_figures(tmp_path / "new" / "figures.json", rows, CPU)
    assert json.loads((tmp_path / "new" / "figures.json").read_text())["figures"] == rows


def test_contenders_take_turns() -> None:
    order: list[str] = []
    work = {name: partial(order.append, name) for name in "ab"}
    times = timing.interleaved(work, CPU, 3, warm_up=1, before=lambda name: order.append(f"before {name}"))
    assert order == ["before a", "a", "before b", "b"] * 4
    assert [len(values) for values in times.values()] == [3, 3]
    order.clear()
    timing.interleaved(work, CPU, 2, warm_up=0, before=lambda name: order.append(f"before {name}"), settle=2)
    assert order == ["before a", "a", "a", "a", "before b", "b", "b", "b"] * 2


def test_memory_that_a_step_takes_is_seen() -> None:
    grown = timing.peak_extra_bytes(lambda: torch.ones(1 << 24).sum(), CPU)
    if grown is None:
        pytest.skip("this system does not tell the peak of resident memory")
    assert grown > 60e6


def test_the_command(small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "optim", "bert-base", "--rounds", "2", "--only", "LARS", "--out", str(tmp_path / "f.json")]
    assert main(arguments) == 0
    assert "largebatch LARS" in capsys.readouterr().out
    assert [row["name"] for row in json.loads((tmp_path / "f.json").read_text())["figures"]] == [
        peers.UNIT,
        "largebatch LARS",
    ]


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "optim", "gpt"]) == 2
    assert "gpt: no such model here; choose among bert-mini" in capsys.readouterr().err
    assert main(["bench", "data", "--text", str(tmp_path / "none.txt")]) == 2
    assert "no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optim", "--out", "{tmp}"], "--out {tmp} is a folder; name a file in it"),
        (["bert", "--out", "{tmp}/file/x.json"], "--out {tmp}/file/x.json: {tmp}/file is no folder; name another"),
        (["optim", "--plot", "{tmp}/plot"], "--plot {tmp}/plot: a PNG is drawn; give it a name that ends in .png"),
        (["optim", "--plot", "{tmp}/plot.bmpx"], "--plot {tmp}/plot.bmpx: a PNG is drawn"),
        (["optim", "--plot", "{tmp}/file/plot.png"], "{tmp}/file is no folder"),
        (["bert", "tiny", "bert-mini"], "unknown BERT size 'bert-mini'; known are tiny, mini"),
        (["data", "huge"], "unknown BERT size 'huge'"),
        (["data", "--google", "{tmp}"], "{tmp}: no such file"),
    ],
)
def test_what_would_lose_the_figures_is_refused_before_they_are_measured(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for measured in ("optim.bench_optim", "bert.bench_bert", "data.bench_data"):
        monkeypatch.setattr(f"largebatch.bench.{measured}", lambda *_, **__: pytest.fail("too late"))
    (tmp_path / "file").touch()
    assert main(["bench", *(argument.format(tmp=tmp_path) for argument in arguments)]) == 2
    captured = capsys.readouterr().err
    assert message.format(tmp=tmp_path) in captured
    assert captured.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--micro-batch", "0"], "argument --micro-batch: '0' is not a whole number of at least 1"),
        (["--sequences", "0"], "argument --sequences: '0'"),
        (["--threads", "-1"], "argument --threads: '-1'"),
        (["--rounds", "many"], "argument --rounds: 'many'"),
    ],
)
def test_what_counts_is_at_least_one(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "bert", *arguments])
    assert message in capsys.readouterr().err


def test_what_the_models_of_bench_bert_cannot_take_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for length in ("4", "1024"):
        assert main(["bench", "bert", "--lengths", "128", "--lengths", length]) == 2
        assert f"--lengths {length}: the models take 5 to 512 tokens" in capsys.readouterr().err
    monkeypatch.setattr("largebatch.data.Corpus.open", lambda path: SimpleNamespace(vocab_size=30_523))
    assert main(["bench", "bert", "--data", str(tmp_path)]) == 2
    assert "a vocabulary of 30,523, and the models have the published one's 30,522" in capsys.readouterr().err


def test_one_round_has_no_quartiles_but_itself(small: None) -> None:
    (row,) = optim.bench_optim(["bert-base"], CPU, rounds=1, only="none of them")
    assert row["ratio_quartiles"] == [row["ratio"]] * 2


def test_benchmarks_without_time_are_named(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "benchmarks", "--budget-s", "5", "--out", str(tmp_path)]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    lines = [f"benchmark failed: {name}: no time left" for name in ("optim", "optim-default-allocator", "bert", "data")]
    assert ended.stderr.splitlines() == lines
    assert not list(tmp_path.iterdir())


def test_a_contender_that_fails_costs_no_other_its_figures(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(params: object) -> object:
        raise RuntimeError("out of memory")

    unit, other, *_ = peers.contenders(CPU, compiled=False)
    named = [unit, peers.Contender("broken", broken), other, peers.Contender("risky", broken, by_name=True)]
    monkeypatch.setattr(optim, "contenders", lambda device, compiled: named)
    said: list[str] = []
    rows = optim.bench_optim(["bert-base"], CPU, rounds=2, say=said.append)
    assert [row["name"] for row in rows] == [unit.name, other.name]
    assert said == ["broken: failed (RuntimeError: out of memory)"]
    optim.bench_optim(["bert-base"], CPU, rounds=2, only="risky", say=said.append)
    assert said[1:] == ["risky: failed (RuntimeError: out of memory)"]


@pytest.mark.slow
def test_bert(tmp_path: Path) -> None:
    assert main(["bench", "bert", "tiny", "--rounds", "1", "--sequences", "4", "--out", str(tmp_path / "b.json")]) == 0
    rows = json.loads((tmp_path / "b.json").read_text())["figures"]
    assert rows[0]["name"] == "largebatch"
    assert 0 < rows[0]["mfu"] < 1
