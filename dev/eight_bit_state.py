"""Does LAMB's state hold in 8 bits? Train a small language model with each way to store m and v, and compare.

    python dev/eight_bit_state.py --seeds 3 --steps 400
    python dev/eight_bit_state.py --directions          # how far u and its norm are off, layer by layer

The task is the next word of the shipped books: the 4,095 commonest words, so that most rows of the embedding have a
gradient now and then only, which is what is hard on a quantised state. The 8-bit states are simulated: after each step
m and v become what the 8 bits would give back, in blocks of 256 elements that share a scale. Codes: "dynamic" has
seven decades, of which each has twice the values of the one below (Dettmers et al. 2022, arXiv 2110.02861); "linear"
has equal gaps, for v between the roots. dev/LOG.md has the figures and the verdict.
"""

import argparse
import lzma
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable
from importlib.resources import files

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from largebatch import LAMB, param_groups

VOCABULARY, LENGTH, BATCH, WIDTH, BLOCK = 4096, 32, 32, 64, 256


def words() -> Tensor:
    packed = files("largebatch") / "assets" / "demo_corpus" / "gutenberg.txt.xz"
    found = re.findall(r"\w+|[^\w\s]", lzma.decompress(packed.read_bytes()).decode()[:6_000_000].lower())
    common = {word: i for i, (word, _) in enumerate(Counter(found).most_common(VOCABULARY - 1))}
    return torch.tensor([common.get(word, VOCABULARY - 1) for word in found])


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Embedding(LENGTH, WIDTH)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.mask: Tensor = nn.Transformer.generate_square_subsequent_mask(LENGTH)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens) + self.position.weight
        return self.norm(self.blocks(h, mask=self.mask, is_causal=True)) @ self.embedding.weight.T


# ---- ways to store a state ----


def dynamic_code(signed: bool) -> Tensor:
    decades = 7
    values = [0.0, 1.0]
    for i in range(decades):
        count = 2**i if signed else 2 ** (i + 1)
        edges = torch.linspace(0.1, 1, count + 1)
        means = ((edges[1:] + edges[:-1]) / 2 * 10.0 ** (i - decades + 1)).tolist()
        values += [*means, *(-mean for mean in means)] if signed else means
    return torch.tensor(sorted(values))


def linear_code(signed: bool) -> Tensor:
    return torch.linspace(-1, 1, 255) if signed else torch.linspace(0, 1, 256)


def through_8_bits(state: Tensor, code: Tensor, by_chance: bool) -> Tensor:
    """Return what 8 bits an element and one scale a block would give back."""
    blocks = pad(state.reshape(-1), (0, -state.numel() % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True).clamp_min(1e-38)
    x = blocks / scale
    above = torch.searchsorted(code, x.contiguous()).clamp(1, len(code) - 1)
    low, high = code[above - 1], code[above]
    up = torch.rand_like(x) < (x - low) / (high - low) if by_chance else x - low > high - x
    return (torch.where(up, high, low) * scale).reshape(-1)[: state.numel()].view_as(state)


def quantiser(code: Callable[[bool], Tensor], by_chance: bool, roots: bool) -> Callable[..., None]:
    signed, unsigned = code(True), code(False)

    def after_step(optimizer: LAMB, *_: object) -> None:
        for state in optimizer.state.values():
            m, v = state["exp_avg"], state["exp_avg_sq"]
            m.copy_(through_8_bits(m, signed, by_chance))
            stored = through_8_bits(v.sqrt() if roots else v, unsigned, by_chance)
            v.copy_(stored.square() if roots else stored)

    return after_step


WAYS: dict[str, tuple[dict[str, torch.dtype], Callable[..., None] | None]] = {
    "float32": ({}, None),
    "bfloat16, by chance": ({"state_dtype": torch.bfloat16}, None),
    "8-bit dynamic, nearest": ({}, quantiser(dynamic_code, False, False)),
    "8-bit dynamic, by chance": ({}, quantiser(dynamic_code, True, False)),
    "8-bit linear, nearest": ({}, quantiser(linear_code, False, True)),
    "8-bit linear, by chance": ({}, quantiser(linear_code, True, True)),
}


def loss_of(model: nn.Module, starts: Tensor, text: Tensor) -> Tensor:
    windows = text[starts[:, None] + torch.arange(LENGTH + 1)]
    return cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def held_out_loss(way: str, seed: int, steps: int, lr: float, corpus: Tensor) -> float:
    torch.manual_seed(seed)
    training, held_out = corpus[:-65536], corpus[-65536:]
    model = LanguageModel()
    settings, after_step = WAYS[way]
    optimizer = LAMB(param_groups(model, weight_decay=0.01), lr=lr, **settings)
    if after_step is not None:
        optimizer.register_step_post_hook(after_step)
    warmup = max(1, steps // 10)
    shape = lambda t: min((t + 1) / warmup, (steps - t) / (steps - warmup))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
    batches = torch.Generator().manual_seed(seed)

    for _ in range(steps):
        loss = loss_of(model, torch.randint(len(training) - LENGTH, (BATCH,), generator=batches), training)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        losses = [
            float(loss_of(model, torch.arange(i, i + 8192 - LENGTH, LENGTH), held_out)) for i in range(0, 57344, 8192)
        ]
    return statistics.mean(losses)


def print_directions(corpus: Tensor, steps: int = 150) -> None:
    """Print ‖u − u₃₂‖/‖u₃₂‖ and ‖u‖/‖u₃₂‖ for the state of a float32 run, stored in each way to the nearest."""
    torch.manual_seed(0)
    model = LanguageModel()
    optimizer = LAMB(param_groups(model, weight_decay=0.01), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, torch.randint(len(corpus) - LENGTH, (BATCH,)), corpus).backward()
        optimizer.step()

    def u(m: Tensor, v: Tensor) -> Tensor:
        return m / (1 - 0.9**steps) / ((v / (1 - 0.999**steps)).sqrt() + 1e-6)

    for name, x in model.named_parameters():
        m, v = optimizer.state[x]["exp_avg"], optimizer.state[x]["exp_avg_sq"]
        exact, columns = u(m, v), [f"{name:42}"]
        in_8_bits = [through_8_bits(a, dynamic_code(signed), False) for a, signed in ((m, True), (v, False))]
        for way, stored in (("bfloat16", [m.bfloat16().float(), v.bfloat16().float()]), ("8-bit", in_8_bits)):
            error, norm = (float(a.norm() / exact.norm()) for a in (u(*stored) - exact, u(*stored)))
            columns.append(f"{way}: {error:.4f} {norm:.4f}")
        print("   ".join(columns))


def parser_of(description: str | None, ways: Iterable[str]) -> argparse.ArgumentParser:
    """Make the parser of a comparison of several ways to train."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--ways", nargs="*", default=list(ways))
    return parser


def compare(options: argparse.Namespace, held_out_loss: Callable[..., float]) -> None:
    """Print the held-out losses of each way: mean, deviation, one by one, and the seconds they took."""
    corpus = words()
    for way in options.ways:
        start = time.perf_counter()
        losses = [held_out_loss(way, seed, options.steps, options.lr, corpus) for seed in range(options.seeds)]
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        each = " ".join(f"{loss:.4f}" for loss in losses)
        took = time.perf_counter() - start
        print(f"{way:34} {statistics.mean(losses):.4f} ± {spread:.4f}   {each}   {took:.0f} s", flush=True)


def main() -> None:
    parser = parser_of(__doc__, WAYS)
    parser.add_argument("--directions", action="store_true")
    arguments = parser.parse_args()
    if arguments.directions:
        print_directions(words())
    else:
        compare(arguments, held_out_loss)


if __name__ == "__main__":
    main()
