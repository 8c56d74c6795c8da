"""The engine: one batch however it is cut, exact resume, stages, clipping, and what it does when numbers go bad."""

import copy
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

from largebatch import LAMB, schedules
from largebatch.errors import UserError
from largebatch.train import Engine, GlobalBatch, Progress, Stage, TrainingDiverged, checkpoint
from largebatch.train.engine import global_grad_norm
from largebatch.train.step_clock import PARTS

FEATURES, CLASSES = 6, 3


class Classifier(nn.Sequential):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, CLASSES))


def loss(model, micro_batch, totals):
    logits = model(micro_batch["x"])
    # Samples of weight 0 stand for sequences without a masked token.
    losses = nn.functional.cross_entropy(logits, micro_batch["y"], reduction="none") * micro_batch["weight"]
    value = losses.sum() / totals["weighted"]
    correct = ((logits.argmax(1) == micro_batch["y"]) * micro_batch["weight"]).sum() / totals["weighted"]
    return value, {"accuracy": correct.detach()}


def batches_of(micro_batch_size: int, poison_from: int | None = None):
    """Batches that are a function of the cursor alone; sizes 12 in stage 0 and 6 in stage 1."""

    def batches(stage: int, cursor: Mapping[str, int] | None) -> Iterator[GlobalBatch]:
        size = (12, 6)[stage]
        for number in itertools.count(cursor["batch"] if cursor else 0):
            generator = torch.Generator().manual_seed(number)
            x = torch.randn(size, FEATURES, generator=generator)
            y = torch.randint(CLASSES, (size,), generator=generator)
            weight = torch.ones(size)
            weight[:4] = 0  # whole micro-batches of 4 and less count nothing
            if poison_from is not None and number >= poison_from:
                x = x * float("nan")
            cuts = range(0, size, micro_batch_size)
            micro_batches = [
                {
                    "x": x[i : i + micro_batch_size],
                    "y": y[i : i + micro_batch_size],
                    "weight": weight[i : i + micro_batch_size],
                }
                for i in cuts
            ]
            yield GlobalBatch(micro_batches, {"weighted": size - 4}, size, size, 1.0, {"batch": number + 1})

    return batches


def stages(keep_moments: bool = True) -> list[Stage]:
    return [
        Stage("one", 5, 12, schedules.PolynomialDecay(0.05, 5, 2)),
        Stage("two", 4, 6, schedules.PolynomialDecay(0.03, 4, 1), keep_moments),
    ]


def engine_of(micro_batch_size: int = 6, dropout: float = 0.0, keep_moments: bool = True, **settings) -> Engine:
    torch.manual_seed(7)
    model = Classifier(dropout)
    return Engine(
        model, LAMB(model.parameters(), lr=1.0), stages(keep_moments), batches_of(micro_batch_size), loss, **settings
    )


def weights(engine: Engine) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in engine.model.parameters()]


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4, 6])
def test_any_micro_batch_gives_the_gradient_of_the_whole_batch(micro_batch_size):
    """The loss is normalised over the global batch; float32 sums of 12 terms agree to 12 * 2^-24 < 1e-6, relative."""

    def gradient(size):
        engine = engine_of(size, max_grad_norm=None)
        next(engine.run())
        return torch.cat([parameter.grad.flatten() for parameter in engine.model.parameters()])

    whole = gradient(12)
    assert (gradient(micro_batch_size) - whole).norm() <= 1e-6 * whole.norm()


def test_a_loss_averaged_per_micro_batch_would_differ():
    """Companion: with the micro-batch's own mean the gradient depends on the cut, as the weights are uneven."""

    def own_mean(model, micro_batch, totals):
        return loss(model, micro_batch, {"weighted": micro_batch["weight"].sum().clamp(min=1)})

    norms = []
    for size in (12, 2):
        engine = engine_of(size, max_grad_norm=None)
        engine.loss = own_mean
        norms.append(next(engine.run()).grad_norm)
    assert abs(norms[0] - norms[1]) > 0.1 * norms[0]


@pytest.mark.parametrize("stop_after", [2, 5, 7], ids=["inside stage one", "on the boundary", "inside stage two"])
@pytest.mark.parametrize("keep_moments", [True, False])
def test_resume_gives_the_same_bits(tmp_path: Path, stop_after, keep_moments):
    """Weights, metrics, and dropout masks after a stop are those of a run that never stopped."""
    straight = engine_of(dropout=0.3, keep_moments=keep_moments)
    expected = [(result.metrics, result.learning_rate, result.grad_norm) for result in straight.run()]

    first = engine_of(dropout=0.3, keep_moments=keep_moments)
    got = []
    for result in first.run():
        got.append((result.metrics, result.learning_rate, result.grad_norm))
        if result.step == stop_after:
            saved = checkpoint.save(tmp_path, first.model, first.optimizer, first.progress)
            break
    torch.rand(3)  # the random state of the process that resumes is another
    second = engine_of(dropout=0.3, keep_moments=keep_moments)
    for parameter in second.model.parameters():
        nn.init.zeros_(parameter)
    second.progress = checkpoint.load(saved, second.model, second.optimizer)
    got += [(result.metrics, result.learning_rate, result.grad_norm) for result in second.run()]

    assert got == expected
    assert all(torch.equal(a, b) for a, b in zip(weights(second), weights(straight), strict=True))
    assert second.progress.samples == straight.progress.samples == 5 * 12 + 4 * 6


def test_a_resume_that_forgets_the_moments_differs(tmp_path: Path):
    """Companion: the comparison above sees the optimizer's state."""
    straight = engine_of()
    list(straight.run())
    first = engine_of()
    for result in first.run():
        if result.step == 2:
            break
    second = engine_of()
    second.model.load_state_dict(copy.deepcopy(first.model.state_dict()))
    second.progress = first.progress
    list(second.run())
    assert not all(torch.equal(a, b) for a, b in zip(weights(second), weights(straight), strict=True))


def test_dropout_masks_differ_from_step_to_step():
    """Each (step, micro-batch) has masks of its own: two equal micro-batches in a row give two losses."""
    engine = engine_of(dropout=0.5)
    engine.stages = [Stage("one", 2, 12, schedules.Constant(0.0))]
    batch = next(batches_of(6)(0, None))
    same = GlobalBatch([batch.micro_batches[1]] * 2, batch.totals, 12, 12, 1.0, {"batch": 0})
    seen = []
    engine.batches = lambda stage, cursor: itertools.repeat(same)
    engine.loss = lambda *args: (lambda result: seen.append(result[0].item()) or result)(loss(*args))
    list(engine.run())
    assert len(set(seen)) == 4


def test_stages_follow_each_other_and_warm_up_again():
    engine = engine_of()
    results = list(engine.run())
    assert [result.stage.name for result in results] == ["one"] * 5 + ["two"] * 4
    assert [result.stage_step for result in results] == [1, 2, 3, 4, 5, 1, 2, 3, 4]
    assert [result.ends_stage for result in results] == [False] * 4 + [True] + [False] * 3 + [True]
    assert results[5].learning_rate == 0.0
    assert results[6].learning_rate == pytest.approx(0.03 * 3 / 4)
    assert engine.progress == Progress(9, 2, 0, 84, 84, engine.progress.elapsed_s, {"batch": 9})


@pytest.mark.parametrize(("keep_moments", "steps"), [(True, 9), (False, 4)])
def test_moments_are_kept_or_dropped_between_stages(keep_moments, steps):
    engine = engine_of(keep_moments=keep_moments)
    list(engine.run())
    assert {int(state["step"]) for state in engine.optimizer.state.values()} == {steps}


@pytest.mark.parametrize("max_norm", [1e-2, 0.3])
def test_clipping_brings_the_norm_down_to_the_limit(max_norm):
    """The gradient is scaled, not its direction changed; tried at values where the option acts."""
    free, clipped = engine_of(max_grad_norm=None), engine_of(max_grad_norm=max_norm)
    one, other = next(free.run()), next(clipped.run())
    assert one.grad_norm == other.grad_norm > max_norm
    assert other.clipped
    assert not one.clipped
    for a, b in zip(free.model.parameters(), clipped.model.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad * (max_norm / one.grad_norm))
    assert global_grad_norm(list(clipped.model.parameters())) <= max_norm * (1 + 1e-6)


def test_a_small_gradient_is_not_scaled_up():
    free, limited = engine_of(max_grad_norm=None), engine_of(max_grad_norm=1e3)
    next(free.run())
    assert not next(limited.run()).clipped
    for a, b in zip(free.model.parameters(), limited.model.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone_and_ends_the_run():
    engine = engine_of(max_skipped=3)
    engine.batches = batches_of(6, poison_from=2)
    steps = engine.run()
    next(steps), next(steps)
    before = weights(engine)
    results = []
    with pytest.raises(TrainingDiverged, match=r"3 steps up to step 5 .*lower learning rate"):
        results.extend(steps)
    assert engine.progress.step == 5
    assert all(torch.equal(a, b) for a, b in zip(weights(engine), before, strict=True))


# ---- fp16, whose gradients need a scaled loss ----


def test_a_scaled_loss_trains_as_an_unscaled_one() -> None:
    # Products in float16 are good to 2^-11, and nine steps of LAMB amplify that by some tens.
    trained = {}
    for precision in ("fp32", "fp16"):
        engine = engine_of(autocast=precision)
        results = list(engine.run())
        assert {result.loss_scale for result in results} == {2.0**16 if precision == "fp16" else 1.0}
        assert any(result.clipped for result in results), "the scale and the clipping would not meet"
        trained[precision] = weights(engine), [result.grad_norm for result in results]
    assert trained["fp16"][1] == pytest.approx(trained["fp32"][1], rel=0.02)
    for x, y in zip(trained["fp16"][0], trained["fp32"][0], strict=True):
        assert float((x - y).norm() / y.norm()) < 0.02
        assert not torch.equal(x, y)


def test_without_a_scale_small_gradients_are_lost_in_fp16() -> None:
    def faint(model, micro_batch, totals):
        value, metrics = loss(model, micro_batch, totals)
        return value * 2.0**-26, metrics  # below what float16 can hold

    norms = {}
    for scale in (1.0, 2.0**16):
        engine = engine_of(autocast="fp16", progress=Progress(loss_scale=scale))
        engine.loss = faint
        norms[scale] = next(engine.run()).grad_norm * 2.0**26
    assert norms[1.0] < 0.5 * norms[2.0**16]


def test_the_scale_halves_until_the_gradient_is_finite_and_grows_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("largebatch.train.engine.SCALE_GROWS_AFTER", 3)
    engine = engine_of(autocast="fp16", max_skipped=2, progress=Progress(loss_scale=2.0**22))
    before = weights(engine)
    run = engine.run()
    results = [next(run)]
    while results[-1].skipped:
        assert all(torch.equal(x, y) for x, y in zip(before, weights(engine), strict=True))
        results.append(next(run))
    assert len(results) > 3, "the scale was never too large"  # and more in a row than `max_skipped` were borne
    assert [result.loss_scale for result in results] == [2.0 ** (22 - i) for i in range(len(results))]
    engine.progress.loss_scale, engine.progress.steps_at_scale = 64.0, 0
    assert [next(run).loss_scale for _ in range(4)] == [64.0, 64.0, 64.0, 128.0]


def test_nan_ends_an_fp16_run_once_the_scale_is_spent() -> None:
    engine = engine_of(autocast="fp16", max_skipped=2, progress=Progress(loss_scale=4.0))
    engine.batches = batches_of(6, poison_from=0)
    with pytest.raises(TrainingDiverged, match="2 steps"):
        list(engine.run())
    assert engine.progress.step == 4  # at scales of 4 and 2, and then two that count


def test_the_scale_is_resumed_with_the_run(tmp_path: Path) -> None:
    engine = engine_of(autocast="fp16", progress=Progress(loss_scale=64.0))
    next(engine.run())
    path = checkpoint.save(tmp_path, engine.model, engine.optimizer, engine.progress)
    resumed = checkpoint.load(path, engine.model, engine.optimizer)
    assert (resumed.loss_scale, resumed.steps_at_scale) == (64.0, 1)


def test_groups_scale_the_learning_rate():
    model = Classifier()
    groups = [{"params": model[0].parameters(), "lr_scale": 0.1}, {"params": model[3].parameters()}]
    engine = Engine(model, torch.optim.SGD(groups, lr=1.0), stages(), batches_of(6), loss)
    for result in engine.run():
        lrs = [group["lr"] for group in engine.optimizer.param_groups]
        assert lrs == pytest.approx([0.1 * result.learning_rate, result.learning_rate])


def test_a_probe_leaves_no_trace():
    engine = engine_of(dropout=0.3)
    state, before = torch.get_rng_state(), weights(engine)
    engine.probe(next(batches_of(6)(0, None)).micro_batches[1])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(weights(engine), before, strict=True))
    assert all(parameter.grad is None for parameter in engine.model.parameters())


def test_a_probe_leaves_batch_norm_and_no_gradients_when_it_fails():
    engine = engine_of()
    engine.model = nn.Sequential(nn.Linear(FEATURES, 4), nn.BatchNorm1d(4), nn.Linear(4, CLASSES))
    before = {name: x.clone() for name, x in engine.model.state_dict().items()}
    micro_batch = next(batches_of(6)(0, None)).micro_batches[1]
    engine.probe(micro_batch)
    assert all(torch.equal(x, before[name]) for name, x in engine.model.state_dict().items())

    def out_of_memory(grad):
        raise torch.OutOfMemoryError("out of memory")

    engine.model[0].weight.register_hook(out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        engine.probe(micro_batch)
    assert all(x.grad is None for x in engine.model.parameters())
    assert all(torch.equal(x, before[name]) for name, x in engine.model.state_dict().items())


@pytest.mark.parametrize("norm", [0.0, -1.0, float("nan")])
def test_a_norm_that_is_none_to_clip_to_is_refused(norm):
    with pytest.raises(ValueError, match=f"max_grad_norm={norm}: expected a number above 0, or None"):
        next(engine_of(max_grad_norm=norm).run())


def test_only_what_the_optimizer_moves_counts_as_gradient():
    """A head on a body that is not frozen: the body's gradients neither pile up nor clip the head's."""
    whole, head = engine_of(), engine_of()
    whole.model[0].requires_grad_(False)
    for engine in (whole, head):
        engine.optimizer = LAMB(engine.model[3].parameters(), lr=1.0)
    expected, results = list(whole.run()), list(head.run())
    assert [result.grad_norm for result in results] == [result.grad_norm for result in expected]
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(head), strict=True))


def test_gradients_of_what_only_the_optimizer_holds_are_let_go_of_too():
    engine = engine_of()
    temperature = nn.Parameter(torch.ones(1))
    engine.optimizer.add_param_group({"params": [temperature]})
    engine.loss = lambda model, batch, totals: (model(batch["x"]).square().mean() * 0 + temperature.sum(), {})
    assert [result.grad_norm for result in engine.run()] == [2.0] * 5 + [1.0] * 4  # two micro-batches, then one


def test_stages_that_have_no_steps_or_too_few_batches_are_named():
    engine = engine_of()
    engine.stages = [Stage("empty", 0, 12, lambda step: 0.1)]
    with pytest.raises(ValueError, match="stages: 'empty' has 0 steps"):
        next(engine.run())
    engine = engine_of()
    engine.batches = lambda stage, cursor: itertools.islice(batches_of(6)(stage, cursor), 2)
    with pytest.raises(ValueError, match="batches: they end before step 3 of 5 of 'one'"):
        list(engine.run())
    assert engine.progress.step == 2


def test_sparse_gradients_are_refused_by_name():
    engine = engine_of()
    engine.model[0] = nn.EmbeddingBag(8, 16, sparse=True)
    engine.optimizer = torch.optim.SGD(engine.model.parameters(), lr=0.1)
    engine.loss = lambda model, batch, totals: (model(torch.zeros(2, 3, dtype=torch.long)).sum(), {})
    with pytest.raises(ValueError, match="sparse gradients are not supported"):
        next(engine.run())


def test_an_error_in_the_data_reaches_the_caller():
    def broken(stage, cursor):
        yield from itertools.islice(batches_of(6)(stage, cursor), 2)
        raise UserError("shard 3 is damaged")

    engine = engine_of()
    engine.batches = broken
    with pytest.raises(UserError, match="shard 3 is damaged"):
        list(engine.run())
    assert engine.progress.step == 2


@pytest.mark.parametrize("keep_moments", [True, False])
def test_the_optimizer_in_the_backward_pass_is_the_same_training(keep_moments):
    """To the bit, over two stages; the norm of gradients that are gone is a sum in another order."""
    engines = [
        engine_of(12, dropout=0.1, keep_moments=keep_moments, max_grad_norm=None, in_backward=in_backward)
        for in_backward in (False, True)
    ]
    ordinary, in_backward = (list(engine.run()) for engine in engines)
    assert all(torch.equal(a, b) for a, b in zip(*map(weights, engines), strict=True))
    assert [result.metrics for result in ordinary] == [result.metrics for result in in_backward]
    assert [result.grad_norm for result in in_backward] == pytest.approx([r.grad_norm for r in ordinary], rel=1e-6)
    nn.functional.mse_loss(engines[1].model(torch.ones(2, FEATURES)), torch.zeros(2, CLASSES)).backward()
    assert all(x.grad is not None for x in engines[1].model.parameters())  # when the run is over, its hooks are gone


def test_a_gradient_that_is_not_finite_in_the_backward_pass():
    engine = engine_of(12, max_grad_norm=None, in_backward=True, max_skipped=2)
    engine.batches = batches_of(12, poison_from=2)
    run = engine.run()
    assert [next(run).skipped for _ in range(2)] == [False, False]
    before = weights(engine)
    assert [next(run).skipped for _ in range(2)] == [True, True]
    assert all(torch.equal(a, b) for a, b in zip(before, weights(engine), strict=True))
    with pytest.raises(TrainingDiverged):
        next(run)


def test_the_optimizer_in_the_backward_pass_refuses_clipping_and_accumulation():
    with pytest.raises(ValueError, match=r"max_grad_norm=1\.0: expected None with in_backward"):
        next(engine_of(in_backward=True).run())
    with pytest.raises(ValueError, match="in_backward: expected one micro-batch in a step, and there are 2"):
        next(engine_of(6, max_grad_norm=None, in_backward=True).run())


def test_the_parts_of_a_step_add_up_to_it() -> None:
    """Each part is seen, none twice: together they are the step but for a few calls of Python."""
    engine = engine_of(breakdown=True)
    for result in itertools.islice(engine.run(), 3):
        assert list(result.parts_s) == list(PARTS)
        assert all(seconds > 0 for seconds in result.parts_s.values())
        assert result.parts_s["data"] == result.data_s
        assert sum(result.parts_s.values()) <= result.step_s


def test_without_a_breakdown_there_are_no_parts() -> None:
    assert next(engine_of().run()).parts_s == {}
