"""The unigram baseline: what a model that ignores the context can reach on masked-token prediction."""

import numpy as np

from .corpus import Corpus, CorpusSplit


def token_counts(split: CorpusSplit) -> np.ndarray:
    """int64 [vocabulary]: how often each word piece occurs in a split."""
    counts = np.zeros(len(split.vocabulary), dtype=np.int64)
    part = 1 << 22
    for piece in split.tokens():
        for first in range(0, len(piece), part):
            counts += np.bincount(piece[first : first + part], minlength=len(counts))
    return counts


def unigram_entropy(corpus: Corpus, train: str = "train", heldout: str = "heldout") -> float:
    """Cross-entropy in nats per token of held-out text under the training text's unigram distribution.

    H = - sum_v q(v) ln p(v),  p(v) = (n_train(v) + 1) / (N_train + V),  q(v) = n_heldout(v) / N_heldout,

    with V the vocabulary's size: add-one smoothing, so that a piece unseen in training costs something finite. Masked
    positions are uniform over the tokens of A and B, so this is also the expected masked-LM loss of the best
    predictor that sees nothing of the context: a model has learned to read when its held-out loss is below it.

    Args:
        corpus: a prepared corpus.
        train, heldout: its splits; the same name twice gives (with smoothing) the entropy of that split.

    Raises:
        UserError: a split is empty.
    """
    seen = token_counts(corpus.split(train))
    asked = token_counts(corpus.split(heldout))
    log_p = np.log(seen + 1.0) - np.log(seen.sum() + float(len(seen)))
    return float(-(asked @ log_p) / asked.sum())
