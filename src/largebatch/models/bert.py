"""The BERT encoder (Devlin et al., 2019), with transformers' parameter names, computed on real tokens alone.

Shapes: B sequences of padded length L; T real tokens (rows); H the model's width.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .autocast import product_dtype
from .config import BertConfig
from .dense import dense_activation, dense_dropout_add_norm, is_plain
from .dropout import Dropout, number_sites
from .layout import TokenLayout, self_attention

ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_python": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


class BertEmbeddings(nn.Module):
    """LayerNorm(word + position + segment), then dropout; rows of real tokens only."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor,
        layout: TokenLayout,
        lookup: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """[T], [T] -> [T, H]; ``lookup`` takes the place of that of words."""
        embedded = (lookup or self.word_embeddings)(input_ids) + self.token_type_embeddings(token_type_ids)
        return self.dropout(self.LayerNorm(embedded + self.position_embeddings(layout.positions)), layout.row_keys)


class BertSelfAttention(nn.Module):
    """The three projections and the attention itself."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout = Dropout(config.attention_probs_dropout_prob)
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, rows: Tensor, layout: TokenLayout) -> Tensor:
        """[T, H] -> [T, H]."""
        rows = rows.to(product_dtype(rows))  # once: autocast would narrow them for each product, and keep all three
        dropout = self.dropout if self.training and self.dropout.p > 0 else None
        return self_attention(rows, (self.query, self.key, self.value), self.num_heads, layout, dropout)


class BertOutput(nn.Module):
    """LayerNorm(residual + dropout(dense(rows))): the end of both halves of a layer.

    Attributes:
        fused: what to call for all but the matrix product, if it has been compiled; see `compile_elementwise`.
    """

    fused: Callable[..., Tensor] | None = None

    def __init__(self, config: BertConfig, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, rows: Tensor, residual: Tensor, row_keys: Tensor | None) -> Tensor:
        """[T, width], [T, H], [T] -> [T, H]."""
        if self.fused is None or not is_plain(self.LayerNorm, nn.LayerNorm):
            return dense_dropout_add_norm(rows, self.dense, residual, self.dropout, self.LayerNorm, row_keys)
        norm, prob = self.LayerNorm, self.dropout.p if self.training else 0.0
        return self.fused(
            self.dense(rows), residual, norm.weight, norm.bias, norm.eps, prob, row_keys, self.dropout.site
        )


class BertAttention(nn.Module):
    """Self-attention with its output projection, residual and LayerNorm."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertOutput(config, config.hidden_size)

    def forward(self, rows: Tensor, layout: TokenLayout, only: Tensor | None = None) -> Tensor:
        """[T, H] -> [T, H], or [N, H] of the rows in ``only`` [N]."""
        context = self.self(rows, layout)
        if only is not None:
            context, rows = select_rows(context, only), select_rows(rows, only)
        return self.output(context, rows, layout.keys_of(only))


class BertIntermediate(nn.Module):
    """The widening half of the feed-forward layer.

    Attributes:
        fused: what to call for bias and activation, if it has been compiled; see `compile_elementwise`.
    """

    fused: Callable[..., Tensor] | None = None

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACTIVATION_FUNCTIONS[config.hidden_act]

    def forward(self, rows: Tensor) -> Tensor:
        """[T, H] -> [T, intermediate]."""
        if self.fused is None or not is_plain(self.dense, nn.Linear):
            return dense_activation(rows, self.dense, self.activation)
        return self.fused(F.linear(rows, self.dense.weight), self.dense.bias)


class BertLayer(nn.Module):
    """One post-LayerNorm transformer layer."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config, config.intermediate_size)

    def forward(self, rows: Tensor, layout: TokenLayout, only: Tensor | None = None) -> Tensor:
        """[T, H] -> [T, H], or [N, H] of the rows in ``only`` [N]."""
        rows = self.attention(rows, layout, only)
        return self.output(self.intermediate(rows), rows, layout.keys_of(only))


class BertEncoder(nn.Module):
    """The layers, one after another; with ``checkpoint_layers`` each is recomputed in the backward pass."""

    def __init__(self, config: BertConfig, checkpoint_layers: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))
        self.checkpoint_layers = checkpoint_layers

    def forward(self, rows: Tensor, layout: TokenLayout, only: Tensor | None = None) -> Tensor:
        """[T, H] -> [T, H], or [N, H] of the rows in ``only`` [N], past the last layer's attention."""
        for number, layer in enumerate(self.layer, start=1):
            wanted = only if number == len(self.layer) else None
            if self.checkpoint_layers and self.training and torch.is_grad_enabled():
                rows = checkpoint(layer, rows, layout, wanted, use_reentrant=False)
            else:
                rows = layer(rows, layout, wanted)
        return rows


class BertPooler(nn.Module):
    """tanh(dense([CLS]))."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, first_rows: Tensor) -> Tensor:
        """[B, H] -> [B, H]."""
        return torch.tanh(self.dense(first_rows))


class BertModel(nn.Module):
    """The BERT encoder.

    Padding is dropped before the embeddings and put back only where attention or the caller needs it, so the cost
    follows the real tokens. ``unpad=False`` computes every position: the reference the fast path is tested against.

    Args:
        config: the shape.
        add_pooling_layer: whether there is a pooler; without, ``pooled`` is the bare [CLS] row.
        unpad: whether to drop the padding; may be changed later by assigning ``model.unpad``.
        checkpoint_layers: recompute each layer's activations in the backward pass: about 1/3 more work for memory that
            no longer grows with the number of layers.

    Example:
        >>> model = BertModel(BertConfig.named("tiny", vocab_size=100))
        >>> ids = torch.tensor([[1, 2, 3], [4, 5, 0]])
        >>> hidden_states, pooled = model(ids, torch.zeros_like(ids), ids != 0)
        >>> hidden_states.shape, pooled.shape
        (torch.Size([2, 3, 128]), torch.Size([2, 128]))
    """

    def __init__(
        self,
        config: BertConfig,
        add_pooling_layer: bool = True,
        *,
        unpad: bool = True,
        checkpoint_layers: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.unpad = unpad
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config, checkpoint_layers)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        initialize_weights(self, config.initializer_range)
        number_sites(self)

    def encode(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        dropout_keys: Tensor | None = None,
        positions: Tensor | None = None,
        lookup: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, TokenLayout]:
        """Return the hidden states as packed rows [T, H], and the layout that says which row is which token.

        With ``positions`` [N], flat into B * L, only the rows that both heads of pre-training read are computed to the
        end: those of the positions, and after them those of the B tokens [CLS], [N + B, H] in all. ``lookup`` takes the
        place of the word embeddings' own, [T] -> [T, H].
        """
        if input_ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"input_ids: sequences of {input_ids.shape[1]} tokens, but the model has "
                f"max_position_embeddings {self.config.max_position_embeddings}"
            )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids, dtype=torch.bool)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        layout = TokenLayout(attention_mask, unpad=self.unpad, dropout_keys=dropout_keys)
        rows = self.embeddings(layout.pack(input_ids), layout.pack(token_type_ids), layout, lookup)
        only = None if positions is None else torch.cat([layout.rows_at(positions), layout.first_rows])
        return self.encoder(rows, layout, only), layout

    def pool(self, rows: Tensor, layout: TokenLayout) -> Tensor:
        """Return the pooled [CLS] rows [B, H] of packed hidden states."""
        return self.pool_rows(select_rows(rows, layout.first_rows))

    def pool_rows(self, first_rows: Tensor) -> Tensor:
        """[B, H] -> [B, H]: the pooler, where there is one."""
        return first_rows if self.pooler is None else self.pooler(first_rows)

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        dropout_keys: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Encode padded sequences.

        Args:
            input_ids: [B, L] int64.
            token_type_ids: [B, L] int64, the segment of each token; None is all zeros.
            attention_mask: [B, L] bool, true where a token is real; padding comes last. None means all are real.
            dropout_keys: [B] int64, of which the dropout masks of each sequence are functions; None takes them from
                torch's generator.

        Returns:
            Hidden states [B, L, H], zero at padding when ``unpad``, and pooled [CLS] states [B, H].

        Raises:
            ValueError: if sequences are longer than the position embeddings, or begin with padding.
        """
        rows, layout = self.encode(input_ids, token_type_ids, attention_mask, dropout_keys)
        return layout.pad(rows), self.pool(rows, layout)


def select_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Return ``rows[index]``; the indices may repeat."""
    return F.embedding(index, rows)


def initialize_weights(module: nn.Module, std: float) -> None:
    """Initialise as the original BERT does: truncated normal weights (at two standard deviations), zero biases.

    transformers draws from the plain normal distribution instead.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(part.weight, std=std, a=-2 * std, b=2 * std)
        if isinstance(part, nn.Linear):
            nn.init.zeros_(part.bias)
