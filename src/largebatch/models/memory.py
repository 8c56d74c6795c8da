"""How much memory a training step of BERT takes at its peak, by counting what is alive."""

from dataclasses import dataclass

from .config import BertConfig
from .cross_entropy import BLOCK, CPU_BLOCK, CPU_LOGITS, LOGITS


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak of a training step.

    Attributes:
        weights: float32.
        gradients: float32.
        optimizer: its state.
        activations: kept from the forward for the backward pass, the largest that backward passes need beside them
            included.
        vocabulary: what the prediction of masked words needs: a chunk's logits and probabilities, and gradients of
            the word embeddings beside those that are kept.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    vocabulary: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.vocabulary

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {_size(value)}" for name, value in self.__dict__.items())
        return f"{_size(self.total)} at the peak ({parts})"


def num_parameters(config: BertConfig) -> int:
    """Return the parameters of `BertForPreTraining`."""
    width, wide, words = config.hidden_size, config.intermediate_size, config.vocab_size
    layer = 4 * (width**2 + width) + 2 * width * wide + wide + width + 4 * width
    embeddings = (words + config.max_position_embeddings + config.type_vocab_size + 2) * width
    heads = 2 * (width**2 + width) + 2 * width + words + 2 * width + 2
    return config.num_hidden_layers * layer + embeddings + heads + (0 if config.tie_word_embeddings else words * width)


def training_memory(
    config: BertConfig,
    sequences: int,
    length: int,
    masked: int,
    *,
    device: str = "cpu",
    precision: str = "fp32",
    state_bytes: float = 8,
    keyed_dropout: bool = True,
    checkpoint_layers: bool = False,
) -> MemoryEstimate:
    """Estimate the peak of pre-training `BertForPreTraining`, unpadded, gradients accumulated over micro-batches.

    What counts is the real tokens, so sequences of full length give the most that a micro-batch can take. Not counted:
    the process itself (on a CPU 200 to 400 MB of libraries and matrix products' workspace, a GPU's context), batches
    that wait, and what an allocator leaves unused.

    Args:
        config: the model's shape; its dropout counts.
        sequences: in a micro-batch.
        length: real tokens of each.
        masked: tokens of the micro-batch whose words are predicted.
        device: "cpu" or "cuda".
        precision: "fp32", or "bf16" or "fp16" for autocast.
        state_bytes: the optimizer's, for each parameter: 8 for LAMB and Adam, 4 with bfloat16 state, 4 for LARS.
        keyed_dropout: whether the dropout masks are functions of keys.
        checkpoint_layers: whether layers are computed again in the backward pass.

    Returns:
        The estimate. The tensors of a step of BERT-mini to -base on a CPU are within 15% of it, as
        tests/models/test_memory.py holds; for CUDA the count is the same, and has not been held against a GPU.
    """
    width, wide, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    tokens = sequences * length
    last = masked + sequences  # rows that the last layer and the heads are computed for
    item = 4 if precision == "fp32" else 2
    dropping, attention_drops = config.hidden_dropout_prob > 0, config.attention_probs_dropout_prob > 0
    mask = 0 if not dropping else 4 if keyed_dropout else 1
    layer_mask = 0 if keyed_dropout and device == "cpu" else mask  # drawn anew in the backward pass

    # Of a row: query, key, value and context; then for each of the two halves of a layer the input, what LayerNorm
    # saves (float32) and the dropout mask; and the feed-forward layer's inner rows before and after its activation.
    keeps_probs = attention_drops and (device == "cpu" or keyed_dropout)
    probs = heads * length * (item if keyed_dropout else 4) if keeps_probs else 0
    attended = 4 * width * item + probs
    outer = width * item
    finished = width * item + 2 * width * (4 + layer_mask) + 2 * wide * item
    layers = config.num_hidden_layers
    of_layer = tokens * (outer + attended + finished)
    of_last_layer = tokens * (outer + attended) + last * (2 * width * item + finished)
    embeddings = tokens * width * (4 + mask)
    if checkpoint_layers:
        kept = embeddings + layers * tokens * outer + max(of_layer if layers > 1 else 0, of_last_layer)
    else:
        kept = embeddings + (layers - 1) * of_layer + of_last_layer
    transient = tokens * (wide + 2 * width) * item  # gradients on their way down

    parameters = num_parameters(config)
    words = config.vocab_size * width * 4
    logits = masked * config.vocab_size
    chunk, block = (CPU_LOGITS, CPU_BLOCK) if device == "cpu" else (LOGITS, BLOCK)
    narrow = 0 if item == 4 else 2 * parameters  # autocast keeps the weights it has narrowed
    in_head = masked * width * 4 * 6 + words + min(logits, chunk) * item + min(logits, block) * 8
    return MemoryEstimate(
        weights=4 * parameters + narrow,
        gradients=4 * parameters,
        optimizer=round(state_bytes * parameters),
        activations=kept + transient,
        vocabulary=max(in_head, 2 * words + masked * width * 24),
    )


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"
