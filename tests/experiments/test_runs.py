"""Whole runs: two stages, exact resume, export, fine-tuning and report, on a small scale but through the real path."""

import errno
import gzip
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, BertWordPieceTokenizer, Tokenizer

from largebatch.cli import build_parser, main
from largebatch.data import prepare
from largebatch.data.vocabulary import SPECIAL_TOKENS
from largebatch.errors import UserError
from largebatch.evaluate import SquadDataset, evaluate_squad, read_squad
from largebatch.experiments.classification import ClassificationWorkload
from largebatch.experiments.commands import _finetune_settings, configure
from largebatch.experiments.config import SquadConfig, SquadData, override
from largebatch.experiments.evaluation import answer_file, evaluate_run
from largebatch.experiments.recipes import get
from largebatch.experiments.runner import Interrupted, run
from largebatch.experiments.squad import SquadWorkload, windows
from largebatch.experiments.transfer import open_encoder, run_weights
from largebatch.models import BertConfig, BertForQuestionAnswering, save_pretrained
from largebatch.train import checkpoint
from largebatch.train.step_clock import PARTS

from .conftest import ASSETS, small_bert

TIMES = {"tokens_per_s", "sequences_per_s", "flops_per_s", "mfu", "time_s"} | {f"{part}_s" for part in PARTS}


def lines(run_directory: Path, *events: str) -> list[dict]:
    found = [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in found if line["event"] in events]


def small_lenet(*settings: str):
    path = ASSETS / "mnist_sample"
    fixed = ["stages.0.batch_size=100", "stages.0.steps=6", "stages.0.warmup_steps=2", "stages.0.micro_batch_size=50"]
    return override(
        get("lenet-mnist"), [f"data.path={path}", "checkpoint_every=2", "evaluate_every=3", *fixed, *settings]
    )


def test_a_run_directory_holds_everything(pretrained: Path):
    config = json.loads((pretrained / "config.json").read_text())
    summary = json.loads((pretrained / "summary.json").read_text())
    steps = lines(pretrained, "step")
    assert config["kind"] == "pretraining"
    assert config["details"]["bert"]["vocab_size"] == 600
    assert [line["stage"] for line in steps] == ["seq128"] * 5 + ["seq512"] * 4
    assert {"loss", "mlm_loss", "nsp_loss", "mlm_accuracy", "grad_norm", "clipped", "lr", "samples"} <= steps[0].keys()
    assert steps[-1]["samples"] == summary["samples"] == 5 * 16 + 4 * 8
    assert summary["status"] == "complete"
    assert summary["evaluation"]["mlm_loss"] > 0
    assert 0 < summary["baselines"]["unigram_mlm_loss"] < 6.4  # ln 600
    assert json.loads((pretrained / "env.json").read_text())["threads"] >= 1
    assert (pretrained / "tokenizer" / "vocab.txt").exists()
    ratios = lines(pretrained, "trust_ratios")[-1]["ratios"]
    assert "bert.encoder.layer.0.attention.self.query.weight" in ratios
    assert not any("bias" in name or "LayerNorm" in name for name in ratios)


@pytest.mark.parametrize("stop_after", [3, 5, 7], ids=["inside stage 1", "on the boundary", "inside stage 2"])
def test_a_stopped_run_goes_on_with_the_same_bits(corpus: Path, pretrained: Path, tmp_path: Path, stop_after):
    """A SIGTERM at any step, then a resume: metrics and weights are those of the run that never stopped."""

    def stop(result, total):
        if result.step == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    out = tmp_path / "run"
    with pytest.raises(Interrupted, match=f"after step {stop_after}; go on with --resume"):
        run(small_bert(corpus), out, on_step=stop)
    assert checkpoint.latest(out / "checkpoints").name == f"step-{stop_after:08d}"
    run(small_bert(corpus), out, resume=True)
    events = ("step", "eval", "trust_ratios", "stage")
    assert lines(out, *events) == lines(pretrained, *events)
    assert [line["step"] for line in lines(out, "resume")] == [stop_after]
    theirs = run_weights(pretrained)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in run_weights(out).items())


def test_a_run_does_not_go_on_with_other_text(text: Path, corpus: Path, tmp_path: Path):
    """Made anew under the old name, where the weights' shapes would fit. A copy is the same text, wherever it lies."""

    def stop(result, total):
        if result.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    moved, out = tmp_path / "corpus", tmp_path / "run"
    shutil.copytree(corpus, moved)
    with pytest.raises(Interrupted):
        run(small_bert(moved), out, on_step=stop)
    vocabulary = (out / "tokenizer" / "vocab.txt").read_bytes()
    shutil.rmtree(moved)
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[::-1])
    prepare([other], moved, vocab_size=600, heldout=0.2, workers=1, progress=False)
    for command in (lambda: run(small_bert(moved), out, resume=True), lambda: evaluate_run(out)):
        with pytest.raises(UserError, match=r"the data of .*run have changed since it began \((corpus|vocab_size) was"):
            command()
    assert (out / "tokenizer" / "vocab.txt").read_bytes() == vocabulary
    shutil.rmtree(moved)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(corpus, elsewhere)
    assert main(["train", "--resume", "--out", str(out), "--data", str(elsewhere)]) == 0
    assert evaluate_run(out)["mlm_loss"] > 0


@pytest.mark.parametrize(
    ("size", "expected"),
    [("-3", "the micro-batch -3"), ("5", "the micro-batch 5"), ("0", "the micro-batch 0"), ("2", 2)],
)
def test_a_micro_batch_of_a_resumed_run_is_checked(corpus: Path, tmp_path: Path, capsys, size: str, expected):
    def stop(result, total):
        if result.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        run(small_bert(corpus), out, on_step=stop)
    before = (out / "config.json").read_bytes()
    command = ["train", "--resume", "--out", str(out), "--set", f"stages.0.micro_batch_size={size}"]
    if isinstance(expected, int):
        assert main(command) == 0
        stages = json.loads((out / "config.json").read_text())["stages"]
        assert [stage["micro_batch_size"] for stage in stages] == [expected, 4]
    else:
        assert main(command) == 2
        assert f"stages.0.batch_size is 16, no multiple of {expected}" in capsys.readouterr().err
        assert (out / "config.json").read_bytes() == before


def test_a_killed_run_goes_on_from_its_last_checkpoint(corpus: Path, pretrained: Path, tmp_path: Path):
    """Killed without warning after step 5 of a run that writes every 2 steps and at stage ends; the tail is redone."""

    class Killed(Exception):
        pass

    def kill(result, total):
        if result.step == 7:
            raise Killed

    out = tmp_path / "run"
    with pytest.raises(Killed):
        run(small_bert(corpus), out, on_step=kill)
    assert checkpoint.latest(out / "checkpoints").name == "step-00000006"
    run(small_bert(corpus), out, resume=True)
    assert lines(out, "step") == lines(pretrained, "step")


def test_two_processes_do_not_train_one_run(corpus: Path, tmp_path: Path):
    """A run under way is refused to others, as a start and as a resume, and is none the worse for it."""
    refused = []

    def start_again(result, total):
        for resume in (True, False):
            with pytest.raises(UserError) as error:
                run(small_bert(corpus), out, resume=resume)
            refused.append(str(error.value))

    out = tmp_path / "run"
    run(small_bert(corpus, "stages.0.steps=1", "stages.1.steps=1"), out, on_step=start_again)
    assert refused[0] == f"{out} is being trained by another process; wait for it, or name another with --out"
    assert refused[1].startswith(f"{out} holds a run already")


def test_a_full_disk_is_one_line(corpus: Path, tmp_path: Path, monkeypatch, capsys):
    def full(self, event, **values):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("largebatch.train.metrics.RunDirectory.log", full)
    with pytest.raises(UserError, match=r"run cannot be written \(.*No space left on device\); make room, and go on"):
        run(small_bert(corpus), tmp_path / "run")


def test_another_seed_gives_another_run(corpus: Path, pretrained: Path, tmp_path: Path):
    """Companion: the comparisons above can fail."""
    run(small_bert(corpus, "seed=1"), tmp_path / "run")
    assert lines(tmp_path / "run", "step") != lines(pretrained, "step")


def test_the_micro_batch_does_not_change_the_run(corpus: Path, tmp_path: Path):
    """Without dropout, whose masks go with the micro-batch: float32 sums in another order, amplified over 9 steps."""
    still = ("model.hidden_dropout=0", "model.attention_dropout=0")
    run(small_bert(corpus, *still), tmp_path / "one")
    run(small_bert(corpus, *still, "stages.0.micro_batch_size=16", "stages.1.micro_batch_size=2"), tmp_path / "other")
    one, other = ([line["loss"] for line in lines(tmp_path / name, "step")] for name in ("one", "other"))
    assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.slow  # CPUs without half precision multiply it at a hundredth of the speed
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_what_full_precision_does(
    corpus: Path, pretrained: Path, tmp_path: Path, precision: str
) -> None:
    # Products good to 2^-9 and 2^-12, over nine steps: the losses of about 6 part by less than 0.05.
    run(small_bert(corpus, f"precision={precision}"), tmp_path / "run")
    ours, theirs = lines(tmp_path / "run", "step"), lines(pretrained, "step")
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], abs=0.05)
    assert ours[-1]["loss"] != theirs[-1]["loss"]
    assert [line.get("loss_scale") for line in ours] == [65536.0 if precision == "fp16" else None] * len(ours)


def test_a_micro_batch_is_found_when_none_is_given(corpus: Path, tmp_path: Path):
    short = [f"stages.{stage}.{key}" for stage in (0, 1) for key in ("steps=1", "warmup_steps=0")]
    run(small_bert(corpus, "stages.0.micro_batch_size=none", *short), tmp_path / "run")
    stage = json.loads((tmp_path / "run" / "config.json").read_text())["stages"][0]
    assert stage["batch_size"] % stage["micro_batch_size"] == 0


@pytest.mark.parametrize("name", ["lamb", "lars", "adamw", "sgd"])
def test_a_second_workload_goes_through_the_same_engine(tmp_path: Path, name):
    run(small_lenet(f"optim.name={name}"), tmp_path / "run")
    assert len(lines(tmp_path / "run", "step")) == 6
    assert [line["step"] for line in lines(tmp_path / "run", "eval")] == [3, 6]
    assert len(lines(tmp_path / "run", "trust_ratios")) == (1 if name in ("lamb", "lars") else 0)
    assert 0 <= json.loads((tmp_path / "run" / "summary.json").read_text())["evaluation"]["accuracy"] <= 1


def test_a_run_is_not_evaluated_with_other_images(tmp_path: Path):
    """As many of them, in another order."""
    shutil.copytree(ASSETS / "mnist_sample", tmp_path / "images")
    run(small_lenet(f"data.path={tmp_path / 'images'}"), tmp_path / "run")
    labels = tmp_path / "images" / "train-labels-idx1-ubyte.gz"
    content = gzip.decompress(labels.read_bytes())
    labels.write_bytes(gzip.compress(content[:8] + content[:7:-1]))
    with pytest.raises(UserError, match=r"the data of .*run have changed since it began \(train_data was"):
        evaluate_run(tmp_path / "run")


def test_a_data_set_is_normalised_by_its_own_pixels():
    mnist, fashion = (ClassificationWorkload(small_lenet(*more)) for more in ((), ("data.dataset=fashion-mnist",)))
    for of_mnist, of_fashion in ((mnist._train, fashion._train), (mnist._test, fashion._test)):
        pixels = [of_mnist.images * 0.3081 + 0.1307, of_fashion.images * 0.3530 + 0.2860]
        torch.testing.assert_close(*pixels, rtol=0, atol=1e-6)
    with pytest.raises(UserError, match=r"data\.dataset is 'cifar10'; known are mnist, fashion-mnist"):
        ClassificationWorkload(small_lenet("data.dataset=cifar10"))


def test_images_of_another_size_are_refused(tmp_path: Path):
    for prefix in ("train", "t10k"):
        header = b"\0\0\x08\x03" + b"".join(size.to_bytes(4, "big") for size in (2, 32, 30))
        (tmp_path / f"{prefix}-images-idx3-ubyte").write_bytes(header + bytes(2 * 32 * 30))
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + (2).to_bytes(4, "big") + b"\1\2")
    with pytest.raises(UserError, match=r"train images of 32x30 pixels; lenet reads 28x28"):
        ClassificationWorkload(small_lenet(f"data.path={tmp_path}"))


def test_an_export_leaves_runs_alone(pretrained: Path, tuned: Path, capsys):
    for out in (pretrained, tuned):
        before = (out / "config.json").read_bytes()
        assert main(["export", str(pretrained), "--out", str(out)]) == 2
        assert f"{out} is a run, whose config.json would be lost" in capsys.readouterr().err
        assert (out / "config.json").read_bytes() == before


def test_what_is_exported_is_what_transformers_computes(pretrained: Path, tmp_path: Path):
    """Logits equal to 1e-5 in float32, the tokenizer's ids equal, and the folder fine-tunes as well as the run."""
    transformers = pytest.importorskip("transformers")
    from largebatch.models import BertForPreTraining, load_pretrained

    assert main(["export", str(pretrained), "--out", str(tmp_path / "hf")]) == 0
    theirs = transformers.BertForPreTraining.from_pretrained(tmp_path / "hf").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    batch = tokenizer(
        ["It was a truth.", "A single man [MASK] want of a wife, said she."], return_tensors="pt", padding=True
    )
    ours = load_pretrained(BertForPreTraining, tmp_path / "hf").eval()
    mask = batch["attention_mask"].bool()
    real = mask.flatten().nonzero().flatten()
    with torch.no_grad():
        expected = theirs(**batch)
        logits, next_sentence = ours(batch["input_ids"], batch["token_type_ids"], mask, real)
    torch.testing.assert_close(logits, expected.prediction_logits.flatten(0, 1)[real], atol=1e-5, rtol=0)
    torch.testing.assert_close(next_sentence, expected.seq_relationship_logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("source", ["run", "hf"])
def test_fine_tuning_starts_from_a_run_or_a_folder(pretrained: Path, questions, tmp_path: Path, source, capsys):
    model = pretrained
    if source == "hf":
        model = tmp_path / "hf"
        main(["export", str(pretrained), "--out", str(model)])
    train, test = questions
    out = tmp_path / "squad"
    settings = ["data.max_sequence_length=96", "stages.0.batch_size=8", "stages.0.micro_batch_size=8"]
    arguments = [
        "finetune",
        "squad",
        "--model",
        str(model),
        "--train",
        str(train),
        "--test",
        str(test),
        "--epochs",
        "0.5",
    ]
    assert main([*arguments, "--out", str(out), *[part for s in settings for part in ("--set", s)]]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert 0 <= summary["evaluation"]["exact_match"] <= summary["evaluation"]["f1"] <= 100
    capsys.readouterr()
    assert main(["evaluate", "--squad", str(test), "--predictions", str(out / "predictions.json")]) == 0
    scored = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert scored["f1"] == summary["evaluation"]["f1"]
    assert scored["missing"] == scored["unknown"] == 0


@pytest.fixture(scope="module")
def tuned(pretrained: Path, questions, tmp_path_factory) -> Path:
    """A run of question answering whose windows are far from the usual ones."""
    out = tmp_path_factory.mktemp("tuned") / "squad"
    assert main([*finetuning(pretrained, questions), "--out", str(out)]) == 0
    return out


def finetuning(model: Path, questions: tuple[Path, Path]) -> list[str]:
    names = ("--model", "--train", "--test")
    command = ["finetune", "squad", "--epochs", "0.5"]
    command += [part for name, path in zip(names, (model, *questions), strict=True) for part in (name, str(path))]
    settings = ("max_sequence_length=40", "document_stride=8", "max_query_length=6")
    command += [part for setting in settings for part in ("--set", f"data.{setting}")]
    return [*command, "--set", "stages.0.batch_size=8", "--set", "stages.0.micro_batch_size=8"]


@pytest.mark.parametrize(("settings", "warmup"), [([], 4), (["0"], 0), (["5"], 5)], ids=["a tenth", "none", "given"])
def test_a_warm_up_that_is_given_is_kept(pretrained: Path, questions, tmp_path: Path, settings, warmup: int):
    """A tenth of the steps only where none is; and the same command resumes the run."""

    def stop(result, total):
        if result.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    more = [part for value in settings for part in ("--set", f"stages.0.warmup_steps={value}")]
    command = [*finetuning(pretrained, questions), "--out", str(tmp_path / "run"), *more]
    config = override(get("squad"), _finetune_settings(build_parser().parse_args(command)))
    with pytest.raises(Interrupted):
        run(config, tmp_path / "run", on_step=stop)
    stage = json.loads((tmp_path / "run" / "config.json").read_text())["stages"][0]
    assert (round(0.1 * stage["steps"]), stage["warmup_steps"]) == (4, warmup)
    assert main([*command, "--resume"]) == 0


def test_a_file_is_answered_in_the_runs_own_windows(tuned: Path, questions, capsys):
    figures = []
    for more in ([], ["--squad", str(questions[1])]):
        assert main(["evaluate", str(tuned), *more]) == 0
        figures.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert figures[1] == {**figures[0], "split": questions[1].name}
    usual = evaluate_squad(*_model_and_questions(tuned, questions[1]))[0].metrics()
    assert usual["f1"] != figures[0]["f1"], "the windows make no difference here"


def test_a_run_is_not_evaluated_with_other_questions(tuned: Path, questions, capsys):
    """As many of them, so that no shape or number tells."""
    for path, name in zip(questions, ("train_data", "test_data"), strict=True):
        kept = path.read_bytes()
        content = json.loads(kept)
        asked = content["data"][0]["paragraphs"][0]["qas"]
        asked[0]["question"], asked[1]["question"] = asked[1]["question"], asked[0]["question"]
        path.write_text(json.dumps(content))
        try:
            assert main(["evaluate", str(tuned)]) == 2
            assert f"{tuned} have changed since it began ({name} was" in capsys.readouterr().err
        finally:
            path.write_bytes(kept)
    assert main(["evaluate", str(tuned)]) == 0


def _model_and_questions(run_directory: Path, file: Path) -> tuple[torch.nn.Module, SquadDataset, Tokenizer]:
    encoder = open_encoder(run_directory)
    model = BertForQuestionAnswering(encoder.config)
    encoder.load_into(model)
    return model, read_squad(file), encoder.tokenizer()


def exported(pretrained: Path, folder: Path, **changes: object) -> Path:
    """A model that answers questions, in Hugging Face's format, with the tokenizer of a run."""
    config = BertConfig.named("tiny", **{"vocab_size": 600, **changes})
    save_pretrained(BertForQuestionAnswering(config), folder, open_encoder(pretrained).tokenizer_files)
    return folder


def squad_config(model: Path, questions: tuple[Path, Path], *settings: str) -> SquadConfig:
    train, test = questions
    files = [f"init={model}", f"data.train={train}", f"data.test={test}"]
    return override(get("squad"), [*files, *settings])


def test_a_model_of_few_positions_answers_in_short_windows(pretrained: Path, questions, tmp_path: Path):
    folder = exported(pretrained, tmp_path / "hf", max_position_embeddings=48)
    assert 0 <= answer_file(folder, questions[1])["f1"] <= 100
    note = "windows cut to the model's 48 positions: max_seq_length 48, doc_stride 16, max_query_length 16"
    assert SquadWorkload(squad_config(folder, questions)).notes == [note]
    shorter = ["data.max_sequence_length=40", "data.document_stride=30", "data.max_query_length=30"]
    assert SquadWorkload(squad_config(folder, questions, *shorter)).notes == []


@pytest.mark.parametrize(
    ("asked", "positions", "expected"),
    [
        ((384, 128, 64), 512, (384, 128, 64)),
        ((96, 90, 92), 512, (96, 90, 92)),
        ((96, 90, 92), 96, (96, 90, 92)),
        ((384, 128, 64), 300, (300, 100, 64)),
        ((384, 20, 64), 5, (5, 1, 1)),
        ((96, 90, 93), 512, "data.max_query_length is 93; in windows of 96 tokens it is at most 92"),
        ((384, 128, 64), 4, "the model has max_position_embeddings 4; question and text need 5 positions"),
    ],
)
def test_windows_are_as_asked_for_where_the_model_has_room(asked, positions: int, expected):
    length, stride, query = asked
    data = SquadData(max_sequence_length=length, document_stride=stride, max_query_length=query)
    bert = BertConfig.named("tiny", max_position_embeddings=positions)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            windows(data, bert)
    else:
        assert tuple(windows(data, bert).values()) == expected


def test_a_tokenizer_of_another_model_is_refused(pretrained: Path, questions, tmp_path: Path, capsys):
    folder, out = exported(pretrained, tmp_path / "hf", vocab_size=300), tmp_path / "run"
    for command in (
        ["evaluate", str(folder), "--squad", str(questions[1])],
        [*finetuning(folder, questions), "--out", str(out)],
    ):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert f"{folder}: the tokenizer gives a token the number" in error
        assert "but the model has 300 embeddings; put the model's own tokenizer there" in error
    assert not out.exists()


def test_names_of_another_heads_classes_are_left_out(pretrained: Path, questions, tmp_path: Path):
    """A run's details say what the model is."""
    folder = exported(pretrained, tmp_path / "hf")
    workload = SquadWorkload(squad_config(folder, questions))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"id2label": {"0": "bad", "1": "good"}}))
    assert open_encoder(folder).config.labels == ("bad", "good")
    assert SquadWorkload(squad_config(folder, questions)).details == workload.details


def test_a_folder_that_is_no_run_is_told_from_one(pretrained: Path, tmp_path: Path, capsys):
    folder = exported(pretrained, tmp_path / "hf")
    assert main(["evaluate", str(folder)]) == 2
    assert f"{folder} is a model in Hugging Face's format, not a run; name a file of" in capsys.readouterr().err
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    assert main(["evaluate", str(folder), "--squad", "questions.json"]) == 2
    assert f"{folder / 'config.json'}: not the configuration of a BERT model" in capsys.readouterr().err


def test_a_resumed_run_is_told_nothing_else(pretrained: Path, tuned: Path, questions, capsys):
    """Repeated options are welcome; others were ignored in silence."""

    def line(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 2
        return capsys.readouterr().err

    same = finetuning(pretrained, questions)
    for command in (same, ["finetune", "squad"], ["train"], ["train", "squad"]):
        assert main([*command, "--resume", "--out", str(tuned)]) == 0
    again = ["train", "--resume", "--out", str(pretrained), "--set", "seed=1", "--set", "seed=0"]
    assert main([*again, "--set", "dropout_masks=auto"]) == 0  # the last seed counts, and auto says no other
    resume = ("finetune", "squad", "--resume", "--out", tuned)
    assert "leave epochs=3.0 out" in line(*resume, "--epochs", "3")
    assert f"leave init={tuned} out" in line(*resume, "--model", tuned)
    assert f"leave data.train={questions[1]} out" in line(*resume, "--train", questions[1])
    assert f"leave data.test={questions[0]} out" in line(*resume, "--test", questions[0])
    assert "leave data.bad_answers=skip out" in line(*resume, "--skip-bad-answers")
    of_another = line("train", "bert-mini", "--resume", "--out", pretrained)
    assert f"{pretrained} is a run of bert-tiny, not of bert-mini" in of_another
    of_another = line("finetune", "squad", "--resume", "--out", pretrained)
    assert f"{pretrained} is a run of bert-tiny; go on with `largebatch train --resume" in of_another


@pytest.mark.parametrize(
    ("settings", "text", "pieces"),
    [
        ({}, "Caf\u00e9", ["cafe"]),
        ({"strip_accents": False}, "Caf\u00e9", ["caf\u00e9"]),
        ({"strip_accents": True, "do_lower_case": False}, "caf\u00e9", ["cafe"]),
        ({"tokenize_chinese_chars": True}, "\u4e2d\u6587", ["\u4e2d", "\u6587"]),
        ({"tokenize_chinese_chars": False}, "\u4e2d\u6587", ["\u4e2d\u6587"]),
    ],
)
def test_a_vocabulary_alone_is_read_as_its_settings_say(tmp_path: Path, settings, text: str, pieces: list[str]):
    words = ["cafe", "caf\u00e9", "\u4e2d", "\u6587", "\u4e2d\u6587"]
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL_TOKENS, *words]), encoding="utf-8")
    (tmp_path / "config.json").write_text(json.dumps(BertConfig.named("tiny", vocab_size=10).to_hf()))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = open_encoder(tmp_path).tokenizer()
    assert tokenizer.encode(text, add_special_tokens=False).tokens == pieces


def tokenizer_folder(folder: Path, vocabulary: list[str], config: dict | None = None, **files: dict | None) -> Path:
    content = {**BertConfig.named("tiny", vocab_size=len(vocabulary)).to_hf(), **(config or {})}
    for name, part in {"config": content, **files}.items():
        if part is not None:
            (folder / f"{name}.json").write_text(json.dumps(part))
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in vocabulary), encoding="utf-8")
    return folder


PIECES = [
    *SPECIAL_TOKENS,
    *["the", "The", "cat", "Cat", "caf\u00e9", "cafe", "\u4e2d", "\u6587", "\u4e2d\u6587", "##s", "e", "1"],
]
TEXT = "The Cats caf\u00e9 \u4e2d\u6587 [E1] [e1]"
E1 = {"content": "[E1]", "lstrip": False, "rstrip": False, "normalized": True, "single_word": False, "special": False}
SETTINGS = [
    {"do_lower_case": False},
    {"do_lower_case": True},
    {"do_lower_case": True, "strip_accents": False},
    {"do_lower_case": False, "strip_accents": True},
    {"do_lower_case": True, "tokenize_chinese_chars": False},
]


def assert_numbered_as_by_transformers(folder: Path) -> None:
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)
    ours = open_encoder(folder).tokenizer().encode(TEXT, add_special_tokens=False)
    assert ours.ids == theirs(TEXT, add_special_tokens=False)["input_ids"], ours.tokens


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("lowercase", [True, False])
def test_settings_beside_a_whole_tokenizer_win(tmp_path: Path, settings: dict, lowercase: bool):
    tokenizer = BertWordPieceTokenizer({piece: i for i, piece in enumerate(PIECES)}, lowercase=lowercase)
    tokenizer.add_tokens([AddedToken(**E1)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "BertTokenizer", **settings}
    assert_numbered_as_by_transformers(tokenizer_folder(tmp_path, PIECES, tokenizer_config=settings))
    (tmp_path / "vocab.txt").unlink()
    assert_numbered_as_by_transformers(tmp_path)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(
    "added",
    [
        {"added_tokens": {"[E1]": len(PIECES)}},
        {"decoder": {str(len(PIECES)): E1}},
        {"decoder": {"2": {**E1, "content": "[CLS]"}, str(len(PIECES)): {**E1, "normalized": False, "special": True}}},
    ],
    ids=["a file", "settings", "settings of special tokens"],
)
def test_tokens_added_to_a_vocabulary_alone_are_read(tmp_path: Path, settings: dict, added: dict):
    if "decoder" in added:
        settings = {**settings, "added_tokens_decoder": added["decoder"]}
    folder = tokenizer_folder(tmp_path, PIECES, tokenizer_config=settings, added_tokens=added.get("added_tokens"))
    assert open_encoder(folder).tokenizer().token_to_id("[E1]") == len(PIECES)
    assert_numbered_as_by_transformers(folder)


def test_of_a_piece_that_is_there_twice_the_last_line_counts(tmp_path: Path):
    """And lines that are empty count: a published vocabulary's ids are its lines."""
    folder = tokenizer_folder(tmp_path, [*PIECES[:6], "the", "", *PIECES[6:]])
    assert open_encoder(folder).tokenizer().token_to_id("the") == 6
    assert_numbered_as_by_transformers(folder)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"config": {"tokenizer_class": "BertJapaneseTokenizer"}},
            "vocab.txt is of a BertJapaneseTokenizer, not of BERT's",
        ),
        ({"tokenizer_config": {"tokenizer_class": "BertweetTokenizer"}}, "vocab.txt is of a BertweetTokenizer, not of"),
        (
            {"added_tokens": {"[E1]": 99}},
            r"vocab.txt: the added token '\[E1\]' has the number 99, which does not follow",
        ),
    ],
)
def test_a_vocabulary_that_is_not_all_of_a_tokenizer_is_refused(tmp_path: Path, files: dict, message: str):
    folder = tokenizer_folder(tmp_path, PIECES, **files)
    with pytest.raises(UserError, match=message):
        open_encoder(folder).tokenizer()


def test_a_vocabulary_that_is_no_berts_is_refused(tmp_path: Path):
    folder = tokenizer_folder(tmp_path, ["[UNK]", "[PAD]", "the"], {"tokenizer_class": "BertTokenizerFast"})
    with pytest.raises(
        UserError, match=r"vocab\.txt: lacks \[CLS\] \[SEP\] \[MASK\]; put the vocab\.txt of a BERT there"
    ):
        open_encoder(folder).tokenizer()
    (folder / "vocab.txt").write_bytes(b"the\n\xe9")
    with pytest.raises(UserError, match=r"vocab\.txt: not UTF-8 at byte 4"):
        open_encoder(folder).tokenizer()


def test_a_run_is_evaluated_as_it_was_at_its_end(pretrained: Path, capsys):
    assert main(["evaluate", str(pretrained)]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures == json.loads((pretrained / "summary.json").read_text())["evaluation"]


def test_a_run_is_evaluated_where_its_data_lie_now(pretrained: Path, tuned: Path, corpus: Path, tmp_path: Path, capsys):
    assert main(["evaluate", str(pretrained), "--data", str(shutil.copytree(corpus, tmp_path / "moved"))]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures == json.loads((pretrained / "summary.json").read_text())["evaluation"]
    assert main(["evaluate", str(pretrained), "--data", str(tmp_path / "gone")]) == 2
    assert f"{tmp_path / 'gone'}: there is no such corpus directory" in capsys.readouterr().err
    assert main(["evaluate", str(tuned), "--data", str(corpus)]) == 2
    assert "name a file of them with --squad in place of --data" in capsys.readouterr().err


def test_the_report_reads_a_real_run(pretrained: Path, tmp_path: Path, capsys):
    assert main(["report", str(pretrained), "--out", str(tmp_path / "report")]) == 0
    assert (tmp_path / "report" / "report.html").stat().st_size > 10_000
    assert "seq512" in (tmp_path / "report" / "report.md").read_text()


def test_paths_in_settings_are_good_from_any_directory(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As those of --data are, so that a run can be resumed and evaluated from elsewhere."""
    monkeypatch.chdir(corpus.parent)
    options = build_parser().parse_args(["train", "bert-tiny", "--set", f"data.path={corpus.name}"])
    assert configure(options).data.path == str(corpus.resolve())
    files = ["--train", "a.json,b.json", "--model", "m"]
    settings = _finetune_settings(
        build_parser().parse_args(["finetune", "squad", *files, "--set", "data.test=c,d.json"])
    )
    here = corpus.parent.resolve()
    assert settings[:2] == [f"init={here / 'm'}", f"data.train={here / 'a.json'},{here / 'b.json'}"]
    assert settings[2] == f"data.test={here / 'c,d.json'}"
