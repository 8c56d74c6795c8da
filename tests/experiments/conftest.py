"""A small corpus, a small pre-trained BERT, and a few real questions, made once for the tests of whole runs."""

import json
import lzma
from pathlib import Path

import pytest

import largebatch
from largebatch.data import prepare
from largebatch.experiments.config import override
from largebatch.experiments.recipes import get
from largebatch.experiments.runner import run

ASSETS = Path(largebatch.__file__).parent / "assets"

SMALL = [
    "model.name=tiny",
    "optim.lr=1e-2",
    "stages.0.sequence_length=32",
    "stages.0.batch_size=16",
    "stages.0.micro_batch_size=8",
    "stages.0.steps=5",
    "stages.0.warmup_steps=1",
    "stages.1.sequence_length=64",
    "stages.1.batch_size=8",
    "stages.1.micro_batch_size=4",
    "stages.1.steps=4",
    "stages.1.warmup_steps=1",
    "data.evaluation_sequences=32",
    "trust_ratios_every=2",
    "checkpoint_every=2",
    "device=cpu",
    "precision=fp32",  # runs are compared to 1e-5, on processors with bfloat16 units too
]


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """The first 150 kB of the shipped books."""
    path = tmp_path_factory.mktemp("text") / "books.txt"
    with lzma.open(ASSETS / "demo_corpus" / "gutenberg.txt.xz", "rt", encoding="utf-8") as file:
        path.write_text(file.read(150_000))
    return path


@pytest.fixture(scope="session")
def corpus(text: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("corpus") / "corpus"
    prepare([text], out, vocab_size=600, heldout=0.2, workers=1, progress=False)
    return out


def small_bert(corpus: Path, *settings: str):
    return override(get("bert-tiny"), [*SMALL, f"data.path={corpus}", *settings])


@pytest.fixture(scope="session")
def pretrained(corpus: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "pretrained"
    run(small_bert(corpus), out)
    return out


@pytest.fixture(scope="session")
def questions(tmp_path_factory) -> tuple[Path, Path]:
    """Two files in SQuAD's format with a few paragraphs of the shipped extract each."""
    folder = tmp_path_factory.mktemp("squad")
    paths = []
    for name in ("train", "test"):
        content = json.loads((ASSETS / "squad_extract" / f"{name}.json").read_text())
        content["data"] = [{**content["data"][0], "paragraphs": content["data"][0]["paragraphs"][:3]}]
        paths.append(folder / f"{name}.json")
        paths[-1].write_text(json.dumps(content))
    return paths[0], paths[1]
