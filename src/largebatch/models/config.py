"""The shape of a BERT, under transformers' field names."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from largebatch.errors import UserError

# (layers, width, heads): BERT-base and -large from Devlin et al. (2019), the smaller ones from Turc et al. (2019).
# The feed-forward layer is four times as wide as the model in all of them, and each head is 64 wide.
_NAMED_SHAPES = {
    "tiny": (2, 128, 2),
    "mini": (4, 256, 4),
    "small": (4, 512, 8),
    "medium": (8, 512, 8),
    "base": (12, 768, 12),
    "large": (24, 1024, 16),
}

ACTIVATIONS = ("gelu", "gelu_python", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish", "tanh")


@dataclass(frozen=True)
class BertConfig:
    """The hyper-parameters of a BERT encoder and its heads, named as in transformers' ``config.json``.

    Args:
        vocab_size: rows of the word embedding, and classes of the masked-language-model head.
        hidden_size: width of the model; a multiple of ``num_attention_heads``.
        num_hidden_layers: transformer layers.
        num_attention_heads: heads a layer.
        intermediate_size: width of the feed-forward layer.
        hidden_act: activation of the feed-forward layer and of the head: "gelu" (exact), "gelu_new" (tanh), "relu", ...
        hidden_dropout_prob: dropout after the embeddings and on both residual branches.
        attention_probs_dropout_prob: dropout on the attention weights.
        max_position_embeddings: longest sequence, in tokens.
        type_vocab_size: segments (A and B).
        initializer_range: standard deviation of the initial weights.
        layer_norm_eps: added to the variance in every LayerNorm.
        pad_token_id: id of [PAD]; recorded for other programs, as the attention mask alone says what padding is.
        classifier_dropout: dropout before the classification head; None takes ``hidden_dropout_prob``.
        num_labels: classes of ``BertForSequenceClassification``.
        tie_word_embeddings: whether the masked-language-model head multiplies by the word embeddings.
        labels: the names of the classes; None, or another number of them, calls them LABEL_0 and so on.

    Raises:
        UserError: if a value is out of its range, or the activation is not known.

    Example:
        >>> BertConfig.named("tiny", vocab_size=8192).hidden_size
        128
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    classifier_dropout: float | None = None
    num_labels: int = 2
    tie_word_embeddings: bool = True
    labels: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            "type_vocab_size",
            "num_labels",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"BERT config: {name} is {value!r}; it must be a whole number of at least 1")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            value = getattr(self, name)
            if name == "classifier_dropout" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
                raise UserError(f"BERT config: {name} is {value!r}; it must lie in [0, 1)")
        for name in ("initializer_range", "layer_norm_eps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise UserError(f"BERT config: {name} is {value!r}; it must be a number above 0")
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"BERT config: hidden_size {self.hidden_size} is no multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise UserError(f"BERT config: unknown hidden_act {self.hidden_act!r}; known are {', '.join(ACTIVATIONS)}")

    @classmethod
    def named(cls, name: str, vocab_size: int = 30522, **changes: Any) -> "BertConfig":
        """Return a published size: tiny, mini, small, medium (Turc et al., 2019), base or large (Devlin et al., 2019).

        Args:
            name: the size.
            vocab_size: rows of the word embedding.
            changes: any other field, by name.

        Raises:
            UserError: if the name or a field is not known.
        """
        if name not in _NAMED_SHAPES:
            raise UserError(f"unknown BERT size {name!r}; known are {', '.join(_NAMED_SHAPES)}")
        unknown = sorted(set(changes) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise UserError(f"BERT config: no field is called {unknown[0]!r}")
        layers, width, heads = _NAMED_SHAPES[name]
        shape: dict[str, Any] = {
            "num_hidden_layers": layers,
            "hidden_size": width,
            "num_attention_heads": heads,
            "intermediate_size": 4 * width,
        }
        return cls(vocab_size=vocab_size, **(shape | changes))

    def to_hf(self) -> dict[str, Any]:
        """Return the contents of a ``config.json`` that transformers reads (without ``architectures``)."""
        fields = dataclasses.asdict(self)
        num_labels, labels = fields.pop("num_labels"), fields.pop("labels")
        if labels is None or len(labels) != num_labels:
            labels = _numbered(num_labels)
        return {
            "model_type": "bert",
            **fields,
            "id2label": {str(label): name for label, name in enumerate(labels)},
            "label2id": {name: label for label, name in enumerate(labels)},
        }

    @classmethod
    def from_hf(cls, fields: dict[str, Any], source: str = "config.json") -> "BertConfig":
        """Build a config from the contents of a transformers ``config.json``; fields BERT does not use are ignored.

        Args:
            fields: the parsed JSON object.
            source: where it came from, for messages.

        Raises:
            UserError: if it describes another architecture, a decoder, or relative positions, lacks a size, or holds a
                value out of range.
        """
        model_type = fields.get("model_type")
        if model_type != "bert":
            described = "no model_type" if model_type is None else f"model_type {model_type!r}"
            raise UserError(f"{source}: not the configuration of a BERT model ({described}; 'bert' is needed)")
        if fields.get("is_decoder") or fields.get("add_cross_attention"):
            raise UserError(f"{source}: describes a decoder; only BERT encoders can be loaded")
        position_type = fields.get("position_embedding_type", "absolute")
        if position_type != "absolute":
            raise UserError(f"{source}: position_embedding_type {position_type!r} is not supported, only 'absolute'")
        known = {field.name: fields[field.name] for field in dataclasses.fields(cls) if field.name in fields}
        known.pop("labels", None)  # which a config.json has in id2label
        if isinstance(fields.get("id2label"), dict):
            # of strings in JSON, and of integers in what transformers makes of it
            names = {str(label): str(name) for label, name in fields["id2label"].items()}
            known.setdefault("num_labels", len(names))
            labels = tuple(names.get(str(label), "") for label in range(len(names)))
            known["labels"] = labels if all(labels) and labels != _numbered(len(names)) else None
        try:
            return cls(**known)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None


def _numbered(num_labels: int) -> tuple[str, ...]:
    """The names of classes that have none, as transformers gives them."""
    return tuple(f"LABEL_{label}" for label in range(num_labels))
