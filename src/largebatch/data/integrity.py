"""The integrity report of a corpus: what was read, what was dropped, and what training on it will look like."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .corpus import CorpusSplit
from .instances import PretrainingInstances
from .manifest import Manifest

_REPORT_LENGTHS = (128, 512)
# Padding is computed from the instances of about this many tokens, in runs of documents spread over the corpus.
_PADDING_SAMPLE_TOKENS = 1 << 25
_PADDING_SAMPLE_RUNS = 64


class LengthHistogram:
    """Counts of lengths in the bins 1, 2-3, 4-7, 8-15, ..., and the largest, gathered part by part."""

    def __init__(self) -> None:
        self._counts = np.zeros(64, dtype=np.int64)
        self.largest = 0

    def add(self, lengths: NDArray[np.integer]) -> None:
        """Count positive lengths."""
        if len(lengths):
            self._counts += np.bincount(np.frexp(lengths.astype(np.float64))[1] - 1, minlength=64)
            self.largest = max(self.largest, int(lengths.max()))

    def bins(self) -> dict[str, int]:
        """The counts by bin, from the first to the last that is not empty."""
        filled = np.flatnonzero(self._counts)
        names = ["1", *(f"{1 << bits}-{(2 << bits) - 1}" for bits in range(1, 64))]
        return {names[bit]: int(self._counts[bit]) for bit in range(filled[0], filled[-1] + 1)} if len(filled) else {}


def expected_padding(split: CorpusSplit, seed: int, lengths: Sequence[int] = _REPORT_LENGTHS) -> dict[str, Any]:
    """Instances, their mean real length and the share of padding, for each sequence length, in epoch 0."""
    sample = _spread_sample(split)
    result = {}
    for sequence_length in lengths:
        instances = PretrainingInstances(sample, sequence_length, seed=seed)
        num = instances.num_instances(0)
        part = 1 << 16
        real = sum(
            int(instances.segments(0, np.arange(first, min(first + part, num))).lengths.sum())
            for first in range(0, num, part)
        )
        scale = float(split.sentence_offsets[-1]) / float(sample.sentence_offsets[-1])
        result[str(sequence_length)] = {
            "instances": round(num * scale),
            "mean_length": round(real / num, 3),
            "padding": round(1 - real / num / sequence_length, 6),
        }
    return result


def _spread_sample(split: CorpusSplit) -> CorpusSplit:
    """The same split, or one of the lengths of some of its documents (and no tokens) if it is large."""
    num_tokens = int(split.sentence_offsets[-1])
    if num_tokens <= _PADDING_SAMPLE_TOKENS:
        return split
    edges = np.linspace(0, split.num_documents, _PADDING_SAMPLE_RUNS + 1).astype(np.int64)
    share = _PADDING_SAMPLE_TOKENS / num_tokens
    sentence_lengths, document_lengths = [], []
    for first, end in itertools.pairwise(edges.tolist()):
        end = first + max(1, round((end - first) * share))
        documents = split.document_offsets[first : end + 1]
        document_lengths.append(np.diff(documents))
        sentence_lengths.append(np.diff(split.sentence_offsets[documents[0] : documents[-1] + 1]))

    def offsets(parts: list[NDArray[np.int64]]) -> NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(np.concatenate(parts))])

    return CorpusSplit(split.name, [], offsets(sentence_lengths), offsets(document_lengths), split.vocabulary)


def render_report(manifest: Manifest) -> str:
    """The integrity report as text for people."""
    report = manifest.report
    documents = report["documents"]
    lines = [
        f"documents   {documents['read']:,} read: {documents['train']:,} train, {documents['heldout']:,} held out; "
        f"{documents['empty']:,} empty, {documents['duplicate']:,} duplicate "
        f"({'dropped' if manifest.settings['drop_duplicates'] else 'kept'})"
        + (f", {documents['cut']:,} cut for length" if documents["cut"] else ""),
        f"sentences   {report['sentences']:,}, {report['tokens'] / max(report['sentences'], 1):.1f} tokens each",
        f"tokens      {report['tokens']:,} of {report['characters']:,} characters; "
        f"vocabulary {manifest.tokenizer['vocab_size']:,}; unknown {report['unknown_rate']:.4%}",
    ]
    for length, padding in report["padding"].items():
        lines.append(
            f"length {length:<4} {padding['instances']:,} instances per epoch, mean real length "
            f"{padding['mean_length']:.1f}, padding {padding['padding']:.1%}"
        )
    for title, histogram in (
        ("tokens per document", report["document_tokens"]),
        ("tokens per sentence", report["sentence_tokens"]),
    ):
        lines.append(title)
        most = max(histogram.values(), default=1)
        lines += [f"  {name:>16} {count:>12,} {'#' * round(40 * count / most)}" for name, count in histogram.items()]
    lines += [f"note: {note}" for note in report["notes"]]
    return "\n".join(lines)
