"""Text and image data sets, prepared once and read deterministically."""

from .corpus import Corpus, CorpusSplit
from .instances import PretrainingInstances
from .integrity import render_report
from .manifest import Manifest
from .prepare import prepare, prepare_part
from .sampling import SampleStream, dropout_keys, epoch_order
from .unigrams import unigram_entropy
from .vocabulary import Vocabulary

__all__ = [
    "Corpus",
    "CorpusSplit",
    "Manifest",
    "PretrainingInstances",
    "SampleStream",
    "Vocabulary",
    "dropout_keys",
    "epoch_order",
    "prepare",
    "prepare_part",
    "render_report",
    "unigram_entropy",
]
