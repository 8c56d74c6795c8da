"""`largebatch bench bert`: forward and backward of BERT on real text, against transformers' model as a user gets it."""

import importlib.util
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

import largebatch
from largebatch.data import Corpus, PretrainingInstances, prepare
from largebatch.experiments.pretraining import as_micro_batch
from largebatch.models import BertConfig, BertForPreTraining, compile_elementwise, pretraining_loss, training_flops
from largebatch.train import hardware

from .timing import Work, interleaved, set_allocator

TEXT = Path(largebatch.__file__).parent / "assets" / "demo_corpus"
_TUNED = ", tuned allocator"
MicroBatches = list[dict[str, torch.Tensor]]


@contextmanager
def shipped_corpus() -> Iterator[Corpus]:
    """Prepare the text that the package ships, with a vocabulary of 8,192 of its own."""
    with tempfile.TemporaryDirectory() as folder:
        prepare([TEXT], Path(folder) / "corpus", vocab_size=8192, progress=False)
        yield Corpus.open(Path(folder) / "corpus")


def bench_bert(
    sizes: Sequence[str],
    lengths: Sequence[int],
    device: torch.device,
    *,
    rounds: int = 10,
    sequences: int = 64,
    micro_batch: int = 32,
    corpus: Corpus | None = None,
    peer_bf16: bool = False,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Time ours and transformers' model, in turn, on the same sequences: masked words, next sentences, dropout 0.1.

    Ours runs as the training command runs it: on real tokens alone, the vocabulary's logits at masked positions, on a
    CPU the tuned allocator and dropout by keys; on a GPU also with its element-wise work compiled. Theirs is
    `BertForPreTraining` from its own configuration with its own padding, on a CPU under the allocator as it comes and
    under the tuned one. In each turn one step is not timed, so that a timed one follows its like. Both under bfloat16
    autocast where the device has units for it; ``peer_bf16`` has theirs go under it on other devices too, as its users
    are told to, where a step can take a hundred times longer.
    Both models have the published vocabulary of 30,522, whatever the text's.

    Returns:
        A row for each size, length and contender: real tokens/s, what share of all positions these are,
        the ratio to theirs in the same rounds, and MFU on non-padding FLOPs (`training_flops`) against a matrix product
        measured in the same rounds.
    """
    if corpus is None:
        with shipped_corpus() as shipped:
            return bench_bert(
                sizes,
                lengths,
                device,
                rounds=rounds,
                sequences=sequences,
                micro_batch=micro_batch,
                corpus=shipped,
                peer_bf16=peer_bf16,
                say=say,
            )
    rows = []
    fast_bf16 = hardware.bf16_is_fast(device)
    dtype = torch.bfloat16 if fast_bf16 else torch.float32
    for length in lengths:
        instances = PretrainingInstances(corpus.split("train"), length, seed=0)
        chosen = np.arange(sequences) % instances.num_instances(0)
        arrays = [instances.batch(0, chosen[i : i + micro_batch]) for i in range(0, sequences, micro_batch)]
        batches = [{k: v.to(device) for k, v in as_micro_batch(each).items()} for each in arrays]
        tokens = sum(int(each["lengths"].sum()) for each in arrays)
        for size in sizes:
            config = BertConfig.named(size)
            flops = sum(
                training_flops(config, each["lengths"], len(each["masked_labels"]), whole_layers=False)
                for each in arrays
            )
            autocast = torch.autocast(device.type, torch.bfloat16, enabled=fast_bf16)
            contenders = {"largebatch": _ours(config, batches, sequences, autocast, device)}
            if device.type == "cuda":
                contenders["largebatch, compiled"] = _ours(config, batches, sequences, autocast, device, compiled=True)
            own = list(contenders)
            if importlib.util.find_spec("transformers"):
                contenders["transformers"] = _transformers(config, batches, autocast, device)
                if peer_bf16 and not fast_bf16:
                    slow = torch.autocast(device.type, torch.bfloat16)
                    contenders["transformers, bfloat16"] = _transformers(config, batches, slow, device)
                if device.type == "cpu":
                    contenders |= {f"{name}{_TUNED}": work for name, work in contenders.items() if name not in own}
            else:
                say("transformers: not installed")
            peaks: list[float] = []

            def prepare_turn(name: str, peaks: list[float] = peaks, own: list[str] = own) -> None:
                set_allocator(name in own or name.endswith(_TUNED))
                if name == own[0]:
                    peaks.append(hardware.matmul_flops_per_s(device, dtype))

            times = interleaved(contenders, device, rounds, warm_up=1, before=prepare_turn, settle=1)
            set_allocator(True)
            for name in contenders:
                mfu = statistics.median(flops / s / peak for s, peak in zip(times[name], peaks[-rounds:], strict=True))
                seconds = statistics.median(times[name])
                ratio = statistics.median(a / b for a, b in zip(times[name], times[own[0]], strict=True))
                rows.append(
                    {
                        "benchmark": "bert, forward and backward",
                        "model": f"bert-{size}",
                        "length": length,
                        "sequences": sequences,
                        "micro_batch": micro_batch,
                        "dtype": str(dtype).removeprefix("torch."),
                        "name": name,
                        "ms": 1e3 * seconds,
                        "tokens_per_s": tokens / seconds,
                        "real_share": tokens / (sequences * length),
                        "largebatch_is_faster_by": ratio,
                        "mfu": mfu if name in own else None,
                    }
                )
    return rows


def _ours(
    config: BertConfig,
    batches: MicroBatches,
    sequences: int,
    autocast: torch.autocast,
    device: torch.device,
    compiled: bool = False,
) -> Work:
    model = BertForPreTraining(config).to(device).train()
    if compiled:
        compile_elementwise(model)
    masked = sum(len(batch["masked_labels"]) for batch in batches)
    totals = {"masked": torch.tensor(masked, device=device), "sequences": torch.tensor(sequences, device=device)}
    first = 0
    for batch in batches if device.type == "cpu" else []:  # as `dropout_masks` is by default
        count = len(batch["input_ids"])
        batch["dropout_keys"] = torch.arange(first, first + count)
        first += count

    def run() -> None:
        for batch in batches:
            with autocast:
                loss, _ = pretraining_loss(model, batch, totals)
            loss.backward()
        model.zero_grad(set_to_none=True)

    return run


def _transformers(config: BertConfig, batches: MicroBatches, autocast: torch.autocast, device: torch.device) -> Work:
    import transformers

    their_config = transformers.BertConfig(**{k: v for k, v in config.to_hf().items() if k != "architectures"})
    model = transformers.BertForPreTraining(their_config).to(device).train()
    theirs = []
    for batch in batches:
        labels = torch.full_like(batch["input_ids"], -100)
        labels.view(-1)[batch["masked_positions"]] = batch["masked_labels"]
        theirs.append(
            {
                "input_ids": batch["input_ids"],
                "token_type_ids": batch["token_type_ids"],
                "attention_mask": batch["attention_mask"].long(),
                "labels": labels,
                "next_sentence_label": batch["next_sentence_labels"],
            }
        )

    def run() -> None:
        for batch in theirs:
            with autocast:
                loss = model(**batch).loss
            (loss / len(theirs)).backward()
        model.zero_grad(set_to_none=True)

    return run
