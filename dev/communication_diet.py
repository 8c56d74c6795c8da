"""Is it worth sending less than the gradients? Train a small language model in several ways, and time their messages.

    python dev/communication_diet.py                      # held-out loss after equal steps, three seeds
    python dev/communication_diet.py --times 1000,100     # what a step sends, by link in Mbit/s, of two hosts (root)

Four ranks, which the first command plays in one process, each with its own part of the batch and its own errors:

- float32, and bfloat16: the mean of the gradients;
- low rank 4: PowerSGD with error feedback (arXiv 1905.13727), vectors in float32;
- signs: a bit an element of the momentum, with error feedback at both ends, and a variance that is frozen after the
  first fifth of the steps, as in 1-bit LAMB (arXiv 2104.06069); the trust ratios reckoned anew, or frozen as well;
- the control: the same frozen variance, and all of the momentum.

The task and the model are those of eight_bit_state.py. dev/LOG.md has the figures and the verdict.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from eight_bit_state import LENGTH, LanguageModel, compare, loss_of, parser_of
from several_hosts import address, host, network
from torch import Tensor

from largebatch import LAMB, param_groups

BATCH, RANKS, EXACT_SHARE = 32, 4, 0.2
BETA1, BETA2, EPS = 0.9, 0.999, 1e-6

Mean = Callable[[list[list[Tensor]]], list[Tensor]]  # [rank][layer] -> [layer]


def mean_in(dtype: torch.dtype) -> Mean:
    def mean(of_ranks: list[list[Tensor]]) -> list[Tensor]:
        return [sum((g / RANKS).to(dtype) for g in layer).float() for layer in zip(*of_ranks, strict=True)]

    return mean


class MeanByLowRank:
    """One step of the power method for each matrix, from where the last ended; the rest is kept for the next time."""

    def __init__(self, rank: int, exact_steps: int) -> None:
        self.rank, self.exact_steps = rank, exact_steps
        self.q: dict[int, Tensor] = {}
        self.kept: dict[int, list[Tensor]] = {}

    def __call__(self, of_ranks: list[list[Tensor]]) -> list[Tensor]:
        exact = mean_in(torch.float32)(of_ranks)
        self.exact_steps -= 1
        if self.exact_steps >= 0:
            return exact
        return [
            self.of_layer(i, list(layer)) if layer[0].dim() > 1 else exact[i]
            for i, layer in enumerate(zip(*of_ranks, strict=True))
        ]

    def of_layer(self, i: int, layer: list[Tensor]) -> Tensor:
        if i not in self.q:
            self.q[i] = torch.randn(layer[0].shape[1], self.rank, generator=torch.Generator().manual_seed(i))
            self.kept[i] = [torch.zeros_like(g) for g in layer]
        whole = [g + kept for g, kept in zip(layer, self.kept[i], strict=True)]
        p = torch.linalg.qr(sum(m @ self.q[i] for m in whole) / RANKS).Q
        self.q[i] = sum(m.T @ p for m in whole) / RANKS
        sent = p @ self.q[i].T
        self.kept[i] = [m - sent for m in whole]
        return sent


def signs(value: Tensor, kept: Tensor) -> Tensor:
    """Return the signs of each row, times the row's mean magnitude; what they lack goes into ``kept``."""
    whole = value + kept
    scale = whole.abs().mean(1, keepdim=True)
    sent = torch.where(whole >= 0, scale, -scale)
    torch.sub(whole, sent, out=kept)
    return sent


class MeanOfSigns:
    """A bit an element from every rank to the one that adds up its part, and a bit an element back.

    Every layer is divided by the root mean square that its momentum had at first, so that one scale suits all layers.
    """

    def __init__(self, momenta: list[Tensor]) -> None:
        self.scales = [m.square().mean().sqrt().clamp_min(1e-12) for m in momenta]
        count = sum(m.numel() for m in momenta)
        self.padding = -count % RANKS
        self.kept = torch.zeros(RANKS, count + self.padding)
        self.kept_of_mean = torch.zeros(RANKS, (count + self.padding) // RANKS)

    def __call__(self, of_ranks: list[list[Tensor]]) -> list[Tensor]:
        flat = [
            torch.cat([(m / scale).flatten() for m, scale in zip(own, self.scales, strict=True)]) for own in of_ranks
        ]
        together = torch.nn.functional.pad(torch.stack(flat), (0, self.padding))
        mean = signs(together, self.kept).mean(0).view(RANKS, -1)  # a row for each rank that adds up
        known = signs(mean, self.kept_of_mean).flatten()
        sizes = [m.numel() for m in of_ranks[0]]
        pieces = known[: sum(sizes)].split(sizes)
        return [s * x.view_as(m) for s, x, m in zip(self.scales, pieces, of_ranks[0], strict=True)]


class FrozenLamb:
    """LAMB from where another has come, with its variance for good and a momentum that is a mean over the ranks."""

    def __init__(self, optimizer: LAMB, how: str) -> None:
        self.params = [(x, group) for group in optimizer.param_groups for x in group["params"]]
        states = [optimizer.state[x] for x, _ in self.params]
        self.t = int(states[0]["step"])
        self.momenta = [state["exp_avg"] for state in states]
        self.roots = [(state["exp_avg_sq"] / (1 - BETA2**self.t)).sqrt() for state in states]
        self.ratios = list(optimizer.trust_ratios().values()) if "ratios" in how else None
        self.mean: Mean = MeanOfSigns(self.momenta) if "signs" in how else mean_in(torch.float32)

    @torch.no_grad()
    def step(self, of_ranks: list[list[Tensor]]) -> None:
        self.t += 1
        moved = [[BETA1 * m + (1 - BETA1) * g for m, g in zip(self.momenta, own, strict=True)] for own in of_ranks]
        self.momenta = self.mean(moved)
        for i, (x, group) in enumerate(self.params):
            u = self.momenta[i] / (1 - BETA1**self.t) / (self.roots[i] + EPS) + group["weight_decay"] * x
            ratio = 1.0
            if group["adapt"]:
                ratio = float(x.norm() / u.norm()) if self.ratios is None else float(self.ratios[i])
            x.sub_(group["lr"] * ratio * u)


WAYS = (
    "float32",
    "bfloat16",
    "low rank 4",
    "frozen variance",
    "frozen variance, signs",
    "frozen variance and ratios, signs",
)


def held_out_loss(way: str, seed: int, steps: int, lr: float, corpus: Tensor) -> float:
    torch.manual_seed(seed)
    training, held_out = corpus[:-65536], corpus[-65536:]
    model = LanguageModel()
    optimizer = LAMB(param_groups(model, weight_decay=0.01), lr=lr)
    params = [x for group in optimizer.param_groups for x in group["params"]]
    batches, exact_steps, warmup = torch.Generator().manual_seed(seed), round(EXACT_SHARE * steps), max(1, steps // 10)
    mean: Mean = mean_in(torch.bfloat16 if way == "bfloat16" else torch.float32)
    mean = MeanByLowRank(4, exact_steps) if way.startswith("low rank") else mean
    frozen: FrozenLamb | None = None
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / warmup, (steps - step) / (steps - warmup))
        starts = torch.randint(len(training) - LENGTH, (BATCH,), generator=batches)
        of_ranks = [list(torch.autograd.grad(loss_of(model, own, training), params)) for own in starts.chunk(RANKS)]
        if way.startswith("frozen") and step == exact_steps:
            frozen = FrozenLamb(optimizer, way)
        if frozen is not None:
            frozen.step(of_ranks)
            continue
        for x, g in zip(params, mean(of_ranks), strict=True):
            x.grad = g
        optimizer.step()
    with torch.no_grad():
        pieces = range(0, 57344, 8192)
        return statistics.mean(
            float(loss_of(model, torch.arange(i, i + 8192 - LENGTH, LENGTH), held_out)) for i in pieces
        )


# ---- what a step sends, between real processes ----


def send_float32(g: Tensor) -> None:
    dist.all_reduce(g)


def send_bfloat16(g: Tensor) -> None:
    narrow = g.bfloat16()
    dist.all_reduce(narrow)
    g.copy_(narrow)


def send_signs(g: Tensor) -> None:
    world = dist.get_world_size()
    bits = torch.from_numpy(np.packbits(g.numpy() >= 0))
    received = torch.empty_like(bits)
    dist.all_to_all_single(received, bits)
    votes = np.unpackbits(received.numpy().reshape(world, -1), axis=1).sum(0, dtype=np.uint8)
    mine = torch.from_numpy(np.packbits(2 * votes >= world))
    dist.all_gather(list(bits.chunk(world)), mine)
    g.copy_(torch.from_numpy(np.unpackbits(bits.numpy()))).mul_(2).sub_(1)


def send_low_rank(g: Tensor) -> None:
    """As if all were square matrices of 512 x 512."""
    matrices = g.view(-1, 512, 512)
    p = matrices @ torch.ones(512, 4)
    dist.all_reduce(p)
    p = torch.linalg.qr(p).Q
    q = matrices.mT @ p
    dist.all_reduce(q)
    torch.matmul(p, q.mT, out=matrices)


def on_host(rank: int, elements: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://{address(0)}:29500", rank=rank, world_size=2)
    g = torch.randn(elements, generator=torch.Generator().manual_seed(rank))
    for send in (send_float32, send_bfloat16, send_low_rank, send_signs):
        times_s = []
        for _ in range(6):
            dist.barrier()
            start = time.perf_counter()
            send(g)
            times_s.append(time.perf_counter() - start)
        if rank == 0:
            print(f"{send.__name__:16} {1000 * statistics.median(times_s[1:]):.0f} ms", flush=True)
    dist.destroy_process_group()


def times(rates: list[int | None], elements: int) -> None:
    for rate in rates:
        print(f"{elements:,} gradients, link: {rate or 'free'} Mbit/s", flush=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
        command = [sys.executable, str(Path(__file__)), "--elements", str(elements), "--rank"]
        with network(2, rate):
            hosts = [
                subprocess.Popen(["ip", "netns", "exec", host(rank), *command, str(rank)], env=environment)
                for rank in range(2)
            ]
            assert [each.wait(900) for each in hosts] == [0, 0]


def main() -> None:
    parser = parser_of(__doc__, WAYS)
    parser.add_argument("--times", help="Mbit/s, joined by commas")
    parser.add_argument("--elements", type=int, default=40 * 512 * 512, help="gradients of a step; near BERT-mini's")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        on_host(options.rank, options.elements)
        return
    if options.times:
        times([None, *map(int, options.times.split(","))], options.elements)
        return
    compare(options, held_out_loss)


if __name__ == "__main__":
    main()
