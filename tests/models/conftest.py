"""A small BERT with attention that matters, and padded batches of given lengths."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from largebatch.models import BertConfig


@pytest.fixture(scope="session")
def small_config() -> BertConfig:
    """Three layers without dropout; weights large enough that attention is far from uniform."""
    return BertConfig(
        vocab_size=211,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=96,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=64,
        initializer_range=0.15,
        num_labels=3,
    )


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., dict[str, Tensor]]:
    """Return a function: lengths -> a padded batch with everything that any of the losses needs."""

    def batch(
        lengths: Sequence[int], padded_length: int | None = None, *, masked_every: int = 5, seed: int = 0
    ) -> dict:
        generator = torch.Generator().manual_seed(0)
        shape = (len(lengths), padded_length or max(lengths))
        mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
        # Ids at padding are not [PAD] but anything: what is masked must not matter.
        ids = torch.randint(1, 211, shape, generator=generator)
        segments = torch.randint(0, 2, shape, generator=generator)
        masked = mask.flatten().nonzero().squeeze(1)[::masked_every]
        return {
            "input_ids": ids,
            "token_type_ids": segments,
            "attention_mask": mask,
            "masked_positions": masked,
            "masked_labels": torch.randint(0, 211, masked.shape, generator=generator),
            "next_sentence_labels": torch.randint(0, 2, shape[:1], generator=generator),
            "start_positions": (torch.rand(len(lengths), generator=generator) * torch.tensor(lengths)).long(),
            "end_positions": (torch.rand(len(lengths), generator=generator) * torch.tensor(lengths)).long(),
            "labels": torch.randint(0, 3, shape[:1], generator=generator),
        }

    return batch


@pytest.fixture(scope="session")
def assert_same_gradients() -> Callable[..., None]:
    """Return a function that compares two models' gradients, each parameter against the largest gradient of all.

    The scale is common because some gradients are zero but for rounding: the key's bias moves all scores of a softmax.
    """

    def compare(first: torch.nn.Module, second: torch.nn.Module, tolerance: float) -> None:
        gradients, others = (
            {name: parameter.grad for name, parameter in model.named_parameters()} for model in (first, second)
        )
        assert gradients.keys() == others.keys()
        scale = max(gradient.abs().max() for gradient in others.values())
        assert scale > 0
        for name, gradient in gradients.items():
            error = (gradient - others[name]).abs().max()
            assert error <= tolerance * scale, f"{name}: {error / scale:.1e} of the largest gradient"

    return compare
