"""BERT with the heads it is pre-trained and fine-tuned with; parameter names are transformers'.

Shapes: B sequences of padded length L; H the model's width; N masked positions; V the vocabulary.
"""

import dataclasses

import torch.nn.functional as F
from torch import Tensor, nn

from .bert import ACTIVATION_FUNCTIONS, BertModel, initialize_weights
from .config import BertConfig
from .cross_entropy import linear_cross_entropy
from .dense import is_plain
from .dropout import Dropout, number_sites
from .tied import TiedLookup

# Finite, so that sums of two of them and half precision stay finite; exp() of it is 0. The value is original BERT's.
PADDING_LOGIT = -10000.0


class BertPredictionHeadTransform(nn.Module):
    """LayerNorm(activation(dense(rows))), before the decoder."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACTIVATION_FUNCTIONS[config.hidden_act]
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, rows: Tensor) -> Tensor:
        """[N, H] -> [N, H]."""
        return self.LayerNorm(self.activation(self.dense(rows)))


class BertLMPredictionHead(nn.Module):
    """Logits over the vocabulary; the decoder's bias has a second name, ``bias``, as in transformers."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = self.decoder.bias

    def forward(self, rows: Tensor) -> Tensor:
        """[N, H] -> [N, V]."""
        return self.decoder(self.transform(rows))

    def loss(self, rows: Tensor, labels: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """[N, H], [N] and the decoder's [V, H] -> the summed cross-entropy and the number of right answers."""
        if not is_plain(self.decoder, nn.Linear):
            logits = self(rows).float()
            return F.cross_entropy(logits, labels.long(), reduction="sum"), (logits.argmax(-1) == labels).sum()
        return linear_cross_entropy(self.transform(rows), weight, self.decoder.bias, labels)


class BertPreTrainingHeads(nn.Module):
    """The masked-language-model head and the next-sentence head."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.predictions = BertLMPredictionHead(config)
        self.seq_relationship = nn.Linear(config.hidden_size, 2)


class BertForPreTraining(nn.Module):
    """BERT with both pre-training heads; the vocabulary's logits are computed at the masked positions only.

    ``takes_labels`` tells `pretraining_loss` that it may hand over the labels, so that the logits never exist at once.

    Args:
        config: the shape.
        unpad, checkpoint_layers: as for :class:`BertModel`.
    """

    takes_labels = True

    def __init__(self, config: BertConfig, *, unpad: bool = True, checkpoint_layers: bool = False) -> None:
        super().__init__()
        self.config = config
        self.bert = BertModel(config, unpad=unpad, checkpoint_layers=checkpoint_layers)
        self.cls = BertPreTrainingHeads(config)
        initialize_weights(self.cls, config.initializer_range)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the decoder share the word embeddings (again: a model made on the meta device loses the sharing)."""
        if self.config.tie_word_embeddings:
            self.cls.predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight
        self.cls.predictions.bias = self.cls.predictions.decoder.bias

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None,
        attention_mask: Tensor | None,
        masked_positions: Tensor,
        dropout_keys: Tensor | None = None,
        masked_labels: Tensor | None = None,
    ) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor]:
        """Return the logits of the masked tokens and of the next-sentence prediction.

        Args:
            input_ids, token_type_ids, attention_mask, dropout_keys: as for :class:`BertModel`.
            masked_positions: [N] int64, flat into B * L; may be empty.
            masked_labels: [N] int64, for whoever wants no logits but what they come to.

        Returns:
            Logits [N, V] in the order of ``masked_positions``, and [B, 2] (class 1: the second segment is random). With
            ``masked_labels``, in place of the first, `linear_cross_entropy`'s loss and count.
        """
        decoder, words = self.cls.predictions.decoder, self.bert.embeddings.word_embeddings
        weight = decoder.weight
        is_tied = weight is words.weight and is_plain(decoder, nn.Linear) and is_plain(words, nn.Embedding)
        lookup = TiedLookup(weight) if is_tied and masked_labels is not None and weight.device.type == "cpu" else None
        rows, _ = self.bert.encode(input_ids, token_type_ids, attention_mask, dropout_keys, masked_positions, lookup)
        masked_rows, first_rows = rows.split([len(masked_positions), len(input_ids)])
        next_sentence = self.cls.seq_relationship(self.bert.pool_rows(first_rows))
        if masked_labels is None:
            return self.cls.predictions(masked_rows), next_sentence
        weight = weight if lookup is None else lookup.weight
        return self.cls.predictions.loss(masked_rows, masked_labels, weight), next_sentence


class BertForQuestionAnswering(nn.Module):
    """BERT with the extractive question-answering head: the start and the end of the answer span.

    Args:
        config: the shape.
        unpad, checkpoint_layers: as for :class:`BertModel`.
    """

    def __init__(self, config: BertConfig, *, unpad: bool = True, checkpoint_layers: bool = False) -> None:
        super().__init__()
        # transformers makes this head as wide as num_labels says: what it reads must say 2
        self.config = config = dataclasses.replace(config, num_labels=2, labels=None)
        self.bert = BertModel(config, add_pooling_layer=False, unpad=unpad, checkpoint_layers=checkpoint_layers)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        initialize_weights(self.qa_outputs, config.initializer_range)

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        dropout_keys: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return start and end logits [B, L]; padding gets a logit of -10,000, hence no probability."""
        rows, layout = self.bert.encode(input_ids, token_type_ids, attention_mask, dropout_keys)
        logits = layout.pad(self.qa_outputs(rows)).masked_fill(~layout.mask[..., None], PADDING_LOGIT)
        start_logits, end_logits = logits.unbind(-1)
        return start_logits, end_logits


class BertForSequenceClassification(nn.Module):
    """BERT with a classifier on the pooled [CLS] state.

    Args:
        config: the shape; ``num_labels`` is the number of classes.
        unpad, checkpoint_layers: as for :class:`BertModel`.
    """

    def __init__(self, config: BertConfig, *, unpad: bool = True, checkpoint_layers: bool = False) -> None:
        super().__init__()
        self.config = config
        self.bert = BertModel(config, unpad=unpad, checkpoint_layers=checkpoint_layers)
        dropout = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = Dropout(dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        initialize_weights(self.classifier, config.initializer_range)
        number_sites(self)

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        dropout_keys: Tensor | None = None,
    ) -> Tensor:
        """Return class logits [B, num_labels]."""
        rows, layout = self.bert.encode(input_ids, token_type_ids, attention_mask, dropout_keys)
        keys = None if layout.row_keys is None else layout.row_keys[layout.first_rows]
        return self.classifier(self.dropout(self.bert.pool(rows, layout), keys))
