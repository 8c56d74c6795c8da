"""The config: published sizes, transformers' field names both ways, and bad values refused by name."""

import dataclasses
import json
import pickle

import pytest
import torch

from largebatch.errors import UserError
from largebatch.models import BertConfig, BertForPreTraining, BertForQuestionAnswering
from largebatch.models.config import ACTIVATIONS

# Millions of parameters as Turc et al. (2019) print them; BERT-large as Devlin et al. (2019), who round to 340.
PARAMETERS = {"tiny": 4.4, "mini": 11.3, "small": 29.1, "medium": 41.7, "base": 110.1, "large": 340}


@pytest.mark.parametrize(("name", "millions"), PARAMETERS.items())
def test_published_sizes(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = BertForPreTraining(BertConfig.named(name))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert round(count / 1e6, 1 if name != "large" else -1) == millions


def test_heads_are_64_wide() -> None:
    for name in PARAMETERS:
        config = BertConfig.named(name)
        assert config.hidden_size == 64 * config.num_attention_heads
        assert config.intermediate_size == 4 * config.hidden_size


def test_named_takes_changes() -> None:
    config = BertConfig.named("tiny", vocab_size=8192, hidden_dropout_prob=0.0, intermediate_size=99)
    assert (config.vocab_size, config.hidden_dropout_prob, config.intermediate_size) == (8192, 0.0, 99)


def test_round_trip_through_json() -> None:
    config = BertConfig.named(
        "mini", vocab_size=77, hidden_act="relu", classifier_dropout=0.3, num_labels=5, tie_word_embeddings=False
    )
    assert BertConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_names_of_classes_are_kept() -> None:
    config = BertConfig.named("tiny", num_labels=3, labels=("no", "LABEL_1", "yes"))
    fields = json.loads(json.dumps(config.to_hf()))
    assert fields["id2label"] == {"0": "no", "1": "LABEL_1", "2": "yes"}
    assert fields["label2id"] == {"no": 0, "LABEL_1": 1, "yes": 2}
    assert "labels" not in fields
    assert BertConfig.from_hf(fields | {"labels": ["another program's"]}) == config
    assert BertConfig.from_hf(fields | {"id2label": {0: "no", 1: "LABEL_1", 2: "yes"}}) == config
    assert len({config, BertConfig.from_hf(fields)}) == 1
    for ids in ({"1": "a", "2": "b", "3": "c"}, {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}):
        assert BertConfig.from_hf(fields | {"id2label": ids}).labels is None
    # of another head's classes there is nothing to say
    numbered = {"0": "LABEL_0", "1": "LABEL_1"}
    assert dataclasses.replace(config, num_labels=2).to_hf()["id2label"] == numbered
    assert BertForQuestionAnswering(config).config == BertConfig.named("tiny")


def test_transformers_agrees_on_every_field() -> None:
    transformers = pytest.importorskip("transformers")
    ours = BertConfig.named("mini", vocab_size=77, hidden_act="relu", classifier_dropout=0.3, num_labels=5)
    theirs = transformers.BertConfig(**ours.to_hf())
    for name, value in ours.to_hf().items():
        if name != "id2label":
            assert getattr(theirs, name) == value, name
    assert theirs.num_labels == 5
    assert BertConfig.from_hf(theirs.to_dict()) == ours
    named = dataclasses.replace(ours, labels=("a", "b", "c", "d", "e"))
    assert BertConfig.from_hf(transformers.BertConfig(**named.to_hf()).to_dict()) == named
    defaults = transformers.BertConfig().to_dict()
    assert BertConfig.from_hf(defaults) == BertConfig()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu_9"}, "unknown hidden_act 'gelu_9'; known are gelu"),
        ({"hidden_act": ["gelu"]}, "unknown hidden_act"),
        ({"hidden_size": 100}, "hidden_size 100 is no multiple of num_attention_heads 12"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"hidden_dropout_prob": 1.0}, r"hidden_dropout_prob is 1.0; it must lie in \[0, 1\)"),
        ({"classifier_dropout": -0.1}, "classifier_dropout is -0.1"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps is 0.0"),
        ({"initializer_range": "small"}, "initializer_range is 'small'"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"model_type": "roberta"}, "not the configuration of a BERT model"),
        ({"model_type": None}, "not the configuration of a BERT model"),
        ({"is_decoder": True}, "describes a decoder"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key'"),
    ],
)
def test_what_is_no_bert_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=f"^somewhere: .*{message}"):
        BertConfig.from_hf(BertConfig().to_hf() | changes, "somewhere")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match="unknown BERT size 'huge'; known are tiny, mini"):
        BertConfig.named("huge")
    with pytest.raises(UserError, match="no field is called 'dropout'"):
        BertConfig.named("tiny", dropout=0.0)


def test_initial_weights_are_the_original_berts() -> None:
    """Truncated at two standard deviations: the standard deviation that is left is 0.8796 of the nominal one."""
    model = BertForPreTraining(BertConfig.named("tiny", vocab_size=4000))
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    values = torch.cat([matrix.detach().flatten() for matrix in matrices])
    assert values.abs().max() <= 0.04
    # 970,000 draws: the standard error of the standard deviation is below 1e-3 of it
    assert values.std().item() == pytest.approx(0.8796 * 0.02, rel=4e-3)
    for matrix in matrices:
        assert matrix.std() > 0.01
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == float("LayerNorm.weight" in name)).all(), name


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_model_can_be_pickled(activation: str, small_config: BertConfig) -> None:
    model = BertForPreTraining(dataclasses.replace(small_config, hidden_act=activation))
    again = pickle.loads(pickle.dumps(model))
    assert again.cls.predictions.decoder.weight is again.bert.embeddings.word_embeddings.weight
    rows = torch.randn(2, 48)
    assert torch.equal(*(each.cls.predictions(rows) for each in (model, again)))


def test_decoder_shares_the_word_embeddings(small_config: BertConfig) -> None:
    model = BertForPreTraining(small_config)
    names = {name for name, _ in model.named_parameters()}
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert "cls.predictions.decoder.weight" not in names
    assert "cls.predictions.bias" in names
    with torch.device("meta"):
        empty = BertForPreTraining(small_config)
    empty.to_empty(device="cpu").tie_weights()
    assert {name for name, _ in empty.named_parameters()} == names
    untied = BertForPreTraining(BertConfig.from_hf(small_config.to_hf() | {"tie_word_embeddings": False}))
    assert untied.cls.predictions.decoder.weight is not untied.bert.embeddings.word_embeddings.weight
