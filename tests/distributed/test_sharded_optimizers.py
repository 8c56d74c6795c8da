"""Sharded training takes the very steps of one process: FSDP2, HSDP, tensor parallel, both at once, flat partitions.

Guards against the norm of a shard in place of the norm of the layer, which looks right and is not (every other package
does it somewhere), against a collective for every parameter, and against replicas that drift apart.

All cases of one number of ranks run in one group of processes; see optimizer_ranks.py. The layers are skewed so that
no shard is like another: one half of the rows has weights 20 times larger and updates some 20 times smaller.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from skewed import EACH_KIND, OPTIMIZERS, STEPS, Layers, break_gradient, build, gradient

PROGRAM = Path(__file__).with_name("optimizer_ranks.py")

# One float32 sum in another order is 6e-8 off; the trust ratio carries that into every element, 20 times over.
RTOL = 1e-6


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return by number of ranks what each rank saved, running the program where that has not been done."""
    done: dict[int, list[dict[str, Any]]] = {}

    def get(num: int) -> list[dict[str, Any]]:
        if num not in done:
            folder = tmp_path_factory.mktemp(f"ranks{num}")
            # The name of the machine may not resolve; loopback is what these ranks share.
            environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **os.environ}
            command = [sys.executable, str(PROGRAM), str(folder), str(num)]
            finished = subprocess.run(command, env=environment, timeout=200, capture_output=True, text=True)
            assert finished.returncode == 0, finished.stderr[-4000:]
            done[num] = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(num)]
        return done[num]

    return get


def alone(name: str, broken: bool = False) -> dict[str, Any]:
    """Train in this process."""
    model = Layers()
    params = dict(model.named_parameters())
    optimizer = build(name, list(params.values()))
    for step in range(STEPS):
        for key, x in params.items():
            x.grad = gradient(key, x.shape, step)
            x.grad = break_gradient(key, x.grad, step) if broken else x.grad
        optimizer.step()
    ratios = dict(zip(params, optimizer.trust_ratios().values(), strict=True))
    return {
        "params": {key: x.detach() for key, x in params.items()},
        "state": {key: dict(optimizer.state[x]) for key, x in params.items()},
        "ratios": ratios,
    }


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of two sets of layers, each relative to its layer's largest element."""
    return max(float((a[key] - b[key]).abs().max() / b[key].abs().max()) for key in b)


CASES = [
    *[(4, "fsdp", name) for name in OPTIMIZERS],
    *[
        (4, sharding, name)
        for sharding in ("hsdp", "by_row", "by_column", "fsdp_by_column", "fsdp_by_row")
        for name in ("lamb", "lamb-bf16-state", "layerwise")
    ],
    *[(4, "flat", name) for name in ("lamb", "lamb-bf16-state", "layerwise", "lamb-linf", "lars2017")],
    *[(4, "zero_redundancy", name) for name in ("lamb", "lamb-linf", "lars2017")],
    *[
        (2, sharding, "lamb")
        for sharding in ("hsdp", "by_row", "by_column", "fsdp_by_column", "flat", "zero_redundancy")
    ],
    *[(2, "fsdp", name) for name in EACH_KIND],
    *[(8, "by_row", name) for name in EACH_KIND],
]


@pytest.mark.parametrize(("num", "sharding", "name"), CASES)
def test_sharded_equals_one_process(ranks: Any, num: int, sharding: str, name: str) -> None:
    expected = alone(name)
    results = [result[f"{sharding}/{name}"] for result in ranks(num)]
    assert largest_difference(results[0]["params"], expected["params"]) < RTOL
    for result in results[1:]:  # to the bit, on every rank
        assert all(torch.equal(result["params"][key], x) for key, x in results[0]["params"].items())
    if "ratios" in results[0]:
        got = torch.stack(list(results[0]["ratios"].values()))
        torch.testing.assert_close(got, torch.stack(list(expected["ratios"].values())), rtol=RTOL, atol=0)
    for key, state in results[0].get("state", {}).items():
        for of_state, value in state.items():
            if of_state.startswith("exp_avg"):  # which know nothing of norms, in bfloat16 rounded by the same noise
                assert torch.equal(value, expected["state"][key][of_state])


def test_the_norm_of_a_shard_would_be_seen(ranks: Any) -> None:
    """The companion: with local norms the same layers come out wrong by much more than the tolerance."""
    expected = alone("lamb")["params"]
    result = ranks(4)[0]["naive"]
    wrong = {key for key in expected if largest_difference({key: result["params"][key]}, {key: expected[key]}) > 1e-2}
    assert "embedding" in wrong
    ratio = float(result["ratios"]["embedding"] / alone("lamb")["ratios"]["embedding"])
    assert ratio > 3


@pytest.mark.parametrize("name", ["lamb", "lamb-linf", "lamb-reference"])
def test_a_broken_gradient_on_one_rank_holds_the_layer_on_all(ranks: Any, name: str) -> None:
    expected = alone(name, broken=True)["params"]
    assert all(x.isfinite().all() for x in expected.values())
    assert largest_difference(expected, alone(name)["params"]) > 1e-3  # the companion
    for result in ranks(4):
        assert result[f"broken/{name}"]["held"] == [(3, "embedding"), (7, "embedding")]
        assert largest_difference(result[f"broken/{name}"]["params"], expected) < RTOL
        assert torch.equal(
            result[f"broken/{name}"]["params"]["embedding"], ranks(4)[0][f"broken/{name}"]["params"]["embedding"]
        )


def test_gradients_that_are_still_to_be_summed(ranks: Any) -> None:
    results = [result["partial_gradients"] for result in ranks(4)]
    assert largest_difference(results[0]["params"], alone("lamb")["params"]) < RTOL
    for result in results:  # all five gradients in one; nothing else is cut
        assert result["collectives"] == {"allreduce_": 1}
        assert all(torch.equal(result["params"][key], x) for key, x in results[0]["params"].items())


def test_one_all_reduce_for_each_process_group(ranks: Any) -> None:
    for result in ranks(4):
        for case, counts in result["collectives"].items():
            assert counts == {"allreduce_": 2 if case.startswith("fsdp_by") else 1}, case


def test_what_cannot_be_right_is_refused(ranks: Any) -> None:
    for result in ranks(4):
        messages = result["refused"]
        for case in ("flat parameter", "original parameters", "optimizer made before"):
            assert "FSDP1" in messages[case], case
            assert "fully_shard" in messages[case], case
        assert "redistribute" in messages["partial weights"]
