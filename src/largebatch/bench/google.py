"""Google's own `create_pretraining_data.py` beside ours: from text to ten epochs of instances, on one core."""

import os
import resource
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from largebatch.data import Corpus, PretrainingInstances, epoch_order, prepare
from largebatch.data.sentences import split_sentences
from largebatch.errors import UserError

_MODULE = "official.nlp.data.create_pretraining_data"
_EPOCHS = 10  # its dupe_factor
_BATCH = 1024


def bench_google(python: Path, text: Path, vocab: Path, num_bytes: int = 2 << 20) -> list[dict[str, Any]]:
    """CPU seconds from text to instances of length 128 for ten epochs, theirs and ours.

    Theirs reads one sentence to a line, so it is given the text already cut into sentences, which ours does itself;
    and it is spared its start, which is mostly TensorFlow's. Theirs writes the instances to a file, to be read again in
    training; ours are made in training, which is what is timed here.

    Args:
        python: an interpreter with tensorflow, tf-keras and tf-models-official (whose dependencies are not needed).
        text: a text file; its first documents are taken, to the blank line before `num_bytes`.
        vocab: a vocab.txt.

    Raises:
        UserError: the script cannot be run.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        content = text.read_bytes()[:num_bytes]
        content = content[: content.rfind(b"\n\n") + 2] or content
        (folder / "text.txt").write_bytes(content)
        lines = [" ".join(line.split()) for line in content.decode(errors="ignore").split("\n")]
        sentences = "\n".join("\n".join(split_sentences(line)) for line in lines)
        (folder / "sentences.txt").write_text(sentences + "\n", encoding="utf-8")
        (folder / "little.txt").write_text("One. \nTwo.\n\nThree.\n", encoding="utf-8")
        started = _google(python, folder / "little.txt", vocab)
        theirs = _google(python, folder / "sentences.txt", vocab) - started
        start = time.process_time()
        prepare([folder / "text.txt"], folder / "corpus", vocab=vocab, heldout=0.0, workers=1, progress=False)
        num_instances = _all_instances(Corpus.open(folder / "corpus", verify=False))
        ours = time.process_time() - start
    megabytes = len(content) / 1e6
    return [
        {
            "benchmark": "text to ten epochs of instances, one core",
            "name": name,
            "megabytes": megabytes,
            "instances": num_instances,
            "cpu_s": seconds,
            "mb_per_cpu_s": megabytes / seconds,
            "ratio": seconds / ours,
        }
        for name, seconds in (("largebatch", ours), ("create_pretraining_data.py", theirs))
    ]


def _all_instances(corpus: Corpus) -> int:
    """Make the instances of ten epochs in their shuffled order, and return how many there were."""
    instances = PretrainingInstances(corpus.split("train"), 128, seed=0)
    made = 0
    for epoch in range(_EPOCHS):
        num = instances.num_instances(epoch)
        for first in range(0, num, _BATCH):
            instances.batch(epoch, epoch_order(0, epoch, num, first, min(num, first + _BATCH)))
        made += num
    return made


def _google(python: Path, sentences: Path, vocab: Path) -> float:
    """CPU seconds of the script on a file with a sentence to a line."""
    options = {
        "input_file": sentences,
        "output_file": sentences.with_suffix(".tfrecord"),
        "vocab_file": vocab,
        "max_seq_length": 128,
        "max_predictions_per_seq": 20,
        "dupe_factor": _EPOCHS,
    }
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        subprocess.run(
            [str(python), "-m", _MODULE, *(f"--{name}={value}" for name, value in options.items())],
            capture_output=True,
            text=True,
            env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""},
            check=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        told = error.strerror if isinstance(error, OSError) else error.stderr
        why = (told.strip().splitlines() or ["no word of it"])[-1]
        raise UserError(
            f"{python} -m {_MODULE}: failed: {why}; it needs tensorflow, tf-keras and tf-models-official"
        ) from None
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
