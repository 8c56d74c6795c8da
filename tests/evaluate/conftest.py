"""A WordPiece tokenizer, the shipped extract, the real development set, and files made to order."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

import largebatch
from largebatch.evaluate import SquadDataset, SquadFeatures, read_squad, squad_features

EXTRACT = Path(largebatch.__file__).parent / "assets" / "squad_extract"
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(scope="session")
def extract() -> dict[str, SquadDataset]:
    return {name: read_squad(EXTRACT / f"{name}.json") for name in ("train", "test")}


@pytest.fixture(scope="session")
def tokenizer(extract: dict[str, SquadDataset]) -> Tokenizer:
    """BERT's tokenisation with 6,000 word pieces learnt from the extract."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=6000, special_tokens=SPECIAL_TOKENS, show_progress=False)
    tokenizer.train_from_iterator(sorted({e.context for d in extract.values() for e in d}), trainer)
    # As published tokenizer.json files come: with settings of their own, which must play no part.
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=16)
    return tokenizer


@pytest.fixture(scope="session")
def squad_dev(shared_data: Path) -> SquadDataset:
    """The real development set: 10,565 questions, 15 of its 34,680 answers with a wrong offset."""
    return read_squad(shared_data / "squad" / "squaddev_v1.1.json.xz", on_bad_answer="skip")


@pytest.fixture(scope="session")
def dev_features(squad_dev: SquadDataset, tokenizer: Tokenizer) -> SquadFeatures:
    return squad_features(squad_dev.examples, tokenizer)


@pytest.fixture
def squad_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a SQuAD file from (context, question, answer text or (text, start) pairs) triples."""

    def write(*questions: tuple[str, str, Any], name: str = "squad.json", **top: Any) -> Path:
        paragraphs = []
        for number, (context, question, answers) in enumerate(questions):
            pairs = [(answers, context.index(answers))] if isinstance(answers, str) else answers
            entries = [{"text": text, "answer_start": start} for text, start in pairs]
            qas = [{"id": f"q{number}", "question": question, "answers": entries}]
            paragraphs.append({"context": context, "qas": qas})
        path = tmp_path / name
        content = {"version": "1.1", "data": [{"title": "T", "paragraphs": paragraphs}], **top}
        path.write_text(json.dumps(content, indent=1), encoding="utf-8")
        return path

    return write
