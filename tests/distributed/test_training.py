"""The engine on four ranks trains as one process does, under DDP, FSDP2 and its hybrid, however the batch is cut.

Guards against gradients that are averaged where the loss is normalised over the global batch already, against a
reduction for every micro-batch, and against clipping by the norm of a shard. All cases run in one group of processes;
see engine_ranks.py.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import small_training
import torch

PROGRAM = Path(__file__).with_name("engine_ranks.py")
UNITS = 3  # what FSDP2 gathers and reduces at once: two blocks and the rest

# Six steps of float32 sums in another order, about 1e-7 each.
RTOL = 1e-6


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("engine")
    environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **os.environ}
    command = [sys.executable, str(PROGRAM), str(folder), "4"]
    finished = subprocess.run(command, env=environment, timeout=150, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(4)]


def trained_alone(**settings: Any) -> dict[str, Any]:
    engine = small_training.engine(**settings)
    results = list(engine.run())
    return {
        "losses": [result.metrics["loss"] for result in results],
        "norms": [result.grad_norm for result in results],
        "weights": {name: x.detach() for name, x in engine.model.named_parameters()},
    }


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return trained_alone()


def assert_same_training(results: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    """Equal to one process's, and replicas equal to the bit."""
    assert results[0]["losses"] == pytest.approx(alone["losses"], rel=RTOL)
    assert results[0]["norms"] == pytest.approx(alone["norms"], rel=RTOL)
    for name, x in alone["weights"].items():
        assert float((results[0]["weights"][name] - x).abs().max() / x.abs().max()) < RTOL
        assert all(torch.equal(result["weights"][name], results[0]["weights"][name]) for result in results)
    assert alone["losses"][0] != pytest.approx(alone["losses"][-1], rel=1e-2)  # it did learn something


@pytest.mark.parametrize("cut", ["", ", one micro-batch", ", offloaded"])
@pytest.mark.parametrize("sharding", ["ddp", "fsdp", "hsdp"])
def test_ranks_train_as_one_process_does(ranks: Any, alone: Any, sharding: str, cut: str) -> None:
    results = [result[sharding + cut] for result in ranks]
    assert_same_training(results, alone)
    assert all(results[0]["clipped"])


def test_offloading_notices_weights_that_are_loaded_into_shards(ranks: Any) -> None:
    for result in ranks:
        plain, offloaded = (result["after loading"][key] for key in ("False", "True"))
        for name, x in plain.items():
            torch.testing.assert_close(offloaded[name], x, rtol=RTOL, atol=0)


@pytest.mark.parametrize("sharding", ["fsdp", "hsdp"])
def test_the_optimizer_in_the_backward_pass_of_shards(ranks: Any, alone: Any, sharding: str) -> None:
    """Right, at an all-reduce of norms for each layer; replicas are refused, whose gradients DDP sums too late."""
    expected = trained_alone(max_grad_norm=None)
    results = [result[f"{sharding}, in backward"] for result in ranks]
    assert_same_training(results, expected)
    assert expected["losses"] != pytest.approx(alone["losses"], rel=10 * RTOL)  # which are clipped
    num_layers, of_copies = len(expected["weights"]), UNITS if sharding == "hsdp" else 0
    for result in results:  # counts, metrics, the norm of all gradients, and every layer's
        assert result["collectives"]["allreduce_"] == 2 + 1 + num_layers + of_copies
    assert all("fully_shard" in result["refused"] for result in ranks)


def test_the_hybrid_is_refused_on_unequal_machines(ranks: Any) -> None:
    """By all ranks, of which each sees a number that would do; meshes of two kinds wait for each other for ever."""
    assert all("1 to 2 of 4 ranks on a machine" in result["refused machines"] for result in ranks)


@pytest.mark.parametrize("cut", ["", ", one micro-batch"])
def test_one_reduction_of_gradients_for_each_step(ranks: Any, cut: str) -> None:
    """Besides the sums of counts and of metrics: gradients once, and under FSDP2 one norm to clip by, one of layers."""
    assert all(result["fsdp, offloaded"]["collectives"] == result["fsdp"]["collectives"] for result in ranks)
    for result in ranks:
        assert result["ddp" + cut]["collectives"] == {"allreduce_": 2 + 1}  # DDP's buckets hold far more than this
        fsdp, hsdp = result["fsdp" + cut]["collectives"], result["hsdp" + cut]["collectives"]
        assert fsdp["allreduce_"] == 2 + 2
        assert hsdp["allreduce_"] == 2 + 2 + UNITS
        assert fsdp["_reduce_scatter_base_"] == hsdp["_reduce_scatter_base_"] == UNITS


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_compressed_gradients_are_close_and_not_equal(ranks: Any, alone: Any, sharding: str) -> None:
    """bfloat16 has 8 bits: the norm of many elements is off by less than one rounding, 2^-9, and by more than none."""
    difference = [abs(a / b - 1) for a, b in zip(ranks[0][f"{sharding} in bf16"]["norms"], alone["norms"], strict=True)]
    assert 1e-5 < max(difference) < 2**-9


@pytest.mark.parametrize(
    ("name", "clips"),
    [("tensor parallel", True), ("tensor parallel and fsdp", True), ("tensor parallel, in backward", False)],
)
def test_clipping_and_steps_under_tensor_parallelism(ranks: Any, name: str, clips: bool) -> None:
    """Forward, backward, clipping and steps of a block whose layers are cut by row, by column and not at all."""
    block = small_training.Block()
    norms = small_training.few_steps(block, block, clips)
    for result in (result[name] for result in ranks):
        assert result["norms"] == pytest.approx(norms, rel=RTOL)
        for key, x in block.named_parameters():
            x = x.detach()
            assert float((result["weights"][key] - x).abs().max() / x.abs().max()) < RTOL, key
            assert torch.equal(result["weights"][key], ranks[0][name]["weights"][key])
