"""Several hosts on one machine: network namespaces joined by links of a given rate, and torchrun on each.

Shows how a step's time splits into computation and communication, and what a job does when a host falls silent. Linux
and root only: python dev/several_hosts.py --corpus CORPUS
"""

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BRIDGE = "lb-bridge"


def host(number: int) -> str:
    return f"lb-host{number}"


def address(number: int) -> str:
    return f"10.77.0.{number + 1}"


def sh(command: str) -> None:
    subprocess.run(command.split(), check=True)


@contextmanager
def network(num_hosts: int, rate_mbit: int | None) -> Iterator[None]:
    """Make hosts on one switch, each with a link that sends at the rate in Mbit/s; None leaves it alone."""
    try:
        sh(f"ip link add {BRIDGE} type bridge")
        sh(f"ip link set {BRIDGE} up")
        for number in range(num_hosts):
            inside = f"ip netns exec {host(number)}"
            sh(f"ip netns add {host(number)}")
            sh(f"ip link add lb-port{number} type veth peer name eth0 netns {host(number)}")
            sh(f"ip link set lb-port{number} master {BRIDGE} up")
            sh(f"{inside} ip addr add {address(number)}/24 dev eth0")
            sh(f"{inside} ip link set eth0 up")
            sh(f"{inside} ip link set lo up")
            if rate_mbit is not None:
                sh(f"{inside} tc qdisc add dev eth0 root tbf rate {rate_mbit}mbit burst 256kb latency 200ms")
        yield
    finally:
        for number in range(num_hosts):
            subprocess.run(["ip", "link", "del", f"lb-port{number}"], check=False)
            subprocess.run(["ip", "netns", "del", host(number)], check=False)
        subprocess.run(["ip", "link", "del", BRIDGE], check=False)


@contextmanager
def job(num_hosts: int, out: Path, settings: list[str], restarts: int = 0) -> Iterator[list[subprocess.Popen]]:
    """Start one torchrun on each host, with one rank, and yield them."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
    launchers = []
    for number in range(num_hosts):
        command = ["ip", "netns", "exec", host(number), sys.executable, "-m", "torch.distributed.run"]
        command += [f"--nnodes={num_hosts}", "--nproc-per-node=1", f"--max-restarts={restarts}"]
        command += ["--rdzv-backend=c10d", "--rdzv-id=job", f"--rdzv-endpoint={address(0)}:29400"]
        # Namespaces share one name, so torchrun cannot tell by the endpoint which of them is to host its store.
        command += [
            f"--rdzv-conf=is_host={number == 0}",
            f"--local-addr={address(number)}",
            "-m",
            "largebatch",
            "train",
            "bert-tiny",
            "--resume",
        ]
        command += ["--out", str(out), *(part for setting in settings for part in ("--set", setting))]
        with open(out.with_name(f"{out.name}-{host(number)}.log"), "w") as log:
            launchers.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))
    try:
        yield launchers
    finally:
        for launcher in launchers:
            launcher.send_signal(signal.SIGTERM)  # torchrun ends its ranks, which are in sessions of their own
        for launcher in launchers:
            launcher.wait()


def events(out: Path, kind: str) -> list[dict]:
    path = out / "metrics.jsonl"
    written = path.read_text().splitlines(keepends=True) if path.exists() else []
    lines = [json.loads(line) for line in written if line.endswith("\n")]
    return [line for line in lines if line["event"] == kind]


def steps(out: Path) -> list[dict]:
    return events(out, "step")


def settings(corpus: Path, num_hosts: int, accumulate: int, *more: str) -> list[str]:
    per_host = 64
    return [
        f"data.path={corpus}",
        f"stages.0.batch_size={per_host * num_hosts * accumulate}",
        f"stages.0.micro_batch_size={per_host}",
        "stages.0.sequence_length=64",
        "stages.0.steps=14",
        "stages.0.warmup_steps=2",
        "stages.1.steps=1",
        "stages.1.warmup_steps=0",
        f"stages.1.batch_size={num_hosts}",
        "stages.1.micro_batch_size=1",
        "data.evaluation_sequences=1",
        "trust_ratios_every=0",
        "device=cpu",
        *more,
    ]


def measure(
    corpus: Path, folder: Path, num_hosts: int, rates: list[int | None], accumulations: list[int], pause_s: float
) -> list[dict]:
    """Print the step's time for each rate, accumulation and compression, and return the rows."""
    rows = []
    for accumulate in accumulations:
        free_ms = 0.0  # over links that nothing holds back
        for rate in rates:
            for compression in ("none", "bf16") if rate is not None and rate <= 100 else ("none",):
                out = folder / f"{num_hosts}-{rate}-{accumulate}-{compression}"
                chosen = settings(corpus, num_hosts, accumulate, f"gradient_compression={compression}")
                with network(num_hosts, rate), job(num_hosts, out, chosen) as launchers:
                    for launcher in launchers:
                        assert launcher.wait(600) == 0, f"see {out}*.log"
                times_s = [line["time_s"] for line in steps(out)[3:14]]
                # The lower quartile: what else the machine does makes steps longer, and none shorter.
                step_ms = 1000 * statistics.quantiles([b - a for a, b in itertools.pairwise(times_s)], n=4)[0]
                free_ms = step_ms if rate is None else free_ms
                sent = json.loads((out / "summary.json").read_text())["parameters"] * (
                    4 if compression == "none" else 2
                )
                # Of a ring, each host sends the gradients (n - 1)/n times to be summed, and again to be known.
                ring_ms = 8e-3 * sent * 2 * (num_hosts - 1) / num_hosts / rate if rate else 0.0
                row = {
                    "hosts": num_hosts,
                    "link_mbit_per_s": rate,
                    "accumulated": accumulate,
                    "gradient_mb": round(sent / 1e6, 2),
                    "step_ms": round(step_ms),
                    "free_link_ms": round(free_ms),
                    "link_ms": round(step_ms - free_ms),
                    "ring_ms": round(ring_ms),
                }
                if not rows:
                    print(f"| {' | '.join(row)} |\n|{len(row) * '---|'}")
                print(f"| {' | '.join(map(str, row.values()))} |", flush=True)
                rows.append(row)
                time.sleep(pause_s)
    return rows


def cut_off(corpus: Path, folder: Path, tcp_retries: int, timeout_s: int = 15) -> dict[str, Any]:
    """Cut a host off in mid-training; say how long its job takes to end, and whether it goes on afterwards.

    Args:
        corpus: made by `largebatch prepare`.
        folder: for runs and logs.
        tcp_retries: after which the kernel of the host that is cut off gives up torchrun's connection to its store.
        timeout_s: of the run's collectives.
    """
    chosen = settings(corpus, 2, 1, f"timeout_s={timeout_s}", "checkpoint_every=5")
    ended_s: dict[int, float] = {}
    with network(2, None):
        sh(f"ip netns exec {host(1)} sysctl -qw net.ipv4.tcp_retries2={tcp_retries}")
        out = folder / "cut"
        with job(2, out, chosen) as launchers:
            while len(steps(out)) < 8:
                assert all(launcher.poll() is None for launcher in launchers), f"see {folder}/*.log"
                time.sleep(0.05)
            sh("ip link set lb-port1 down")
            begun = time.monotonic()
            while len(ended_s) < 2:
                for number, launcher in enumerate(launchers):
                    if number not in ended_s and launcher.poll() is not None:
                        ended_s[number] = round(time.monotonic() - begun, 1)
                time.sleep(0.1)
        cut_after = len(steps(out))
        sh("ip link set lb-port1 up")
        for again in (out, folder / "whole"):
            with job(2, again, chosen) as launchers:
                assert [launcher.wait(300) for launcher in launchers] == [0, 0], f"see {again}*.log"
    resumed = [line["step"] for line in events(out, "resume")]
    losses, whole = ([line["loss"] for line in steps(run)] for run in (out, folder / "whole"))
    return {
        "ended_s": ended_s,  # after it was cut off, of the host with the store and of the one that was cut off
        "cut_after_step": cut_after,
        "resumed_from_step": resumed,
        "largest_difference": max(abs(a / b - 1) for a, b in zip(losses, whole, strict=True)),  # of a loss
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True, help="made by `largebatch prepare`")
    parser.add_argument("--hosts", default="2", help="numbers of hosts, joined by commas")
    parser.add_argument("--rates", default="1000,100", help="Mbit/s, joined by commas")
    parser.add_argument("--accumulate", default="1,4", help="micro-batches in a step, joined by commas")
    parser.add_argument("--pause", type=float, default=0, help="seconds between jobs, for others on the machine")
    parser.add_argument("--json", type=Path, help="a file for the rows of the table")
    parser.add_argument("--cut-off", action="store_true", help="cut a host off instead of measuring")
    parser.add_argument("--tcp-retries", type=int, default=8, help="of the host that is cut off; Linux has 15")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    print(f"runs and logs: {folder}")
    if options.cut_off:
        print(json.dumps(cut_off(options.corpus.resolve(), folder, options.tcp_retries), indent=1))
        return
    rates = [None, *map(int, options.rates.split(","))]
    accumulations = [int(number) for number in options.accumulate.split(",")]
    rows = []
    for num_hosts in map(int, options.hosts.split(",")):
        rows += measure(options.corpus.resolve(), folder, num_hosts, rates, accumulations, options.pause)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
