"""The scaling rules against the paper's printed tables, which are typed in here a second time.

Learning rates are compared with the paper's own expressions at 1e-15 (a square root, a division and a product:
three roundings of 1.1e-16); step counts and warm-ups exactly.
"""

import pickle
from dataclasses import FrozenInstanceError, astuple, replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from largebatch import plan, schedules
from largebatch.scaling import WORKLOADS, Phase, Stage, Workload, linear_epoch_warmup, linear_lr, sqrt_lr

# LAMB paper, Tables 1 and 4: batch, rate as printed, the same in decimals, warm-up ratio, steps in all.
BERT = [
    (512, 5 / (2**3.0 * 1e3), "6.25e-04", Fraction(1, 320), 1_000_000),
    (1_024, 5 / (2**2.5 * 1e3), "8.839e-04", Fraction(1, 160), 500_000),
    (2_048, 5 / (2**2.0 * 1e3), "1.25e-03", Fraction(1, 80), 250_000),
    (4_096, 5 / (2**1.5 * 1e3), "1.768e-03", Fraction(1, 40), 125_000),
    (8_192, 5 / (2**1.0 * 1e3), "2.5e-03", Fraction(1, 20), 62_500),
    (16_384, 5 / (2**0.5 * 1e3), "3.536e-03", Fraction(1, 10), 31_250),
    (32_768, 5 / (2**0.0 * 1e3), "5e-03", Fraction(1, 5), 15_625),
]
# Table 5: batch, rate as printed, in decimals, warm-up epochs; steps are 90 epochs of 1,281,167 images.
RESNET = [
    (512, 4 / (2**3.0 * 100), "0.005", 0.3125, 225_206),
    (1_024, 4 / (2**2.5 * 100), "0.00707", 0.625, 112_603),
    (2_048, 4 / (2**2.0 * 100), "0.01", 1.25, 56_302),
    (4_096, 4 / (2**1.5 * 100), "0.01414", 2.5, 28_151),
    (8_192, 4 / (2**1.0 * 100), "0.02", 5, 14_076),
    (16_384, 4 / (2**0.5 * 100), "0.02828", 10, 7_038),
    (32_768, 4 / 100, "0.04", 20, 3_519),
]
EXACT = 1e-15


@pytest.mark.parametrize(("batch", "rate", "printed", "ratio", "steps"), BERT)
def test_table_4(batch: int, rate: float, printed: str, ratio: Fraction, steps: int) -> None:
    result = plan("bert", batch)
    first, second = result.stages
    assert first.learning_rate == second.learning_rate == pytest.approx(rate, rel=EXACT)
    digits = len(printed.split("e")[0].replace(".", "")) - 1
    assert f"{first.learning_rate:.{digits}e}" == printed
    assert WORKLOADS["bert"].warmup_ratio(batch) == ratio
    assert first.warmup_steps == 3_125 == ratio * steps
    assert result.total_steps == steps
    assert (first.sequence_length, second.sequence_length) == (128, 512)
    # nine tenths and one tenth of the samples, to one batch
    assert abs(first.samples - 460_800_000) < batch
    assert abs(second.samples - 51_200_000) < batch


@pytest.mark.parametrize(("batch", "rate", "printed", "epochs", "steps"), RESNET)
def test_table_5(batch: int, rate: float, printed: str, epochs: float, steps: int) -> None:
    (stage,) = plan("resnet50", batch).stages
    assert stage.learning_rate == pytest.approx(rate, rel=EXACT)
    assert f"{stage.learning_rate:.{len(printed) - 2}f}" == printed
    assert WORKLOADS["resnet50"].warmup_epochs(batch) == epochs
    assert linear_epoch_warmup(batch, 512, 0.3125) == epochs
    assert stage.warmup_steps == 782
    assert stage.steps == steps
    assert (stage.steps - 1) * batch < 90 * 1_281_167 <= stage.steps * batch
    assert stage.sequence_length is None


def test_the_32k_run() -> None:
    assert plan("bert", 32_768).stages == (
        Stage("seq128", 128, 32_768, 14_063, 5e-3, 3_125),
        Stage("seq512", 512, 32_768, 1_562, 5e-3, 0),
    )


def test_the_mixed_run_by_the_papers_rules() -> None:
    result = plan("bert", (65_536, 32_768))
    first, second = result.stages
    assert (first.steps, second.steps, result.total_steps) == (7_037, 1_562, 8_599)
    assert f"{first.learning_rate:.2e}" == "7.07e-03"
    assert second.learning_rate == 5e-3
    assert (first.warmup_steps, second.warmup_steps) == (3_125, 312)
    assert "not print" in " ".join(result.notes)


def test_the_mixed_run_by_nvidias_recipe() -> None:
    result = plan("bert", (65_536, 32_768), recipe="nvidia")
    assert [astuple(stage)[3:] for stage in result.stages] == [(7_037, 6e-3, 2_000), (1_562, 4e-3, 200)]
    assert result.power == 0.5
    assert "NVIDIA" in result.source
    rate = result.schedule()
    # PAPER: "6e-3 -> ~5.08e-3 at the end of the warm-up"
    assert f"{rate(2_000):.2e}" == "5.08e-03"
    assert rate(7_037) == 0
    assert rate(7_037 + 100) == 2e-3


def test_the_printed_counts_hold_for_the_papers_samples_only() -> None:
    """460.8M / 65,536 = 7,031.25: the rule says 7,032, which is the count of another known script of this run."""
    other = plan("bert", (65_536, 32_768), samples=511_999_999)
    assert [stage.steps for stage in other.stages] == [7_032, 1_562]
    assert [stage.steps for stage in plan("bert", (65_536, 32_768), samples=512_000_000).stages] == [7_037, 1_562]


def test_one_batch_size_makes_one_curve_with_the_drop() -> None:
    result = plan("bert", 32_768)
    assert result.schedule() == schedules.PolynomialDecay(5e-3, 15_625, 3_125)
    assert result.schedule()(3_124) == pytest.approx(0.0049984, rel=1e-12)
    assert result.schedule()(3_125) == pytest.approx(0.004, rel=1e-12)
    assert result.schedule()(14_063) == pytest.approx(5e-3 * 1_562 / 15_625, rel=1e-12)


def test_rewarmup_gives_each_stage_a_curve_of_its_own() -> None:
    result = plan("bert", 32_768, rewarmup=True)
    assert [stage.warmup_steps for stage in result.stages] == [3_125, 312]
    rate = result.schedule()
    assert isinstance(rate, schedules.Stages)
    assert rate.total_steps == 15_625
    assert rate(14_063) == 0
    assert rate(14_063 + 156) == 2.5e-3
    assert rate(14_063 + 312) == pytest.approx(5e-3 * 1_250 / 1_562, rel=1e-12)


def test_rewarmup_spelled_out_as_the_default() -> None:
    assert plan("bert", (65_536, 32_768), rewarmup=True) == plan("bert", (65_536, 32_768))
    assert plan("bert", 512, rewarmup=False) == plan("bert", 512)
    assert plan("bert", 512, rewarmup=True) != plan("bert", 512)


def test_resnet50_takes_the_triangle() -> None:
    assert plan("resnet50", 32_768).schedule() == schedules.Triangle(0.04, 3_519, 782)


def test_a_workload_of_ones_own() -> None:
    """The numbers of a small two-stage run, by hand: 10,000 samples, base 64 with rate 1e-3 and a tenth warm-up."""
    mine = Workload(
        "mine",
        10_000,
        (Phase("short", 32, Fraction(4, 5)), Phase("long", 64, Fraction(1, 5))),
        64,
        1e-3,
        Fraction(1, 10),
    )
    result = plan(mine, (256, 64))
    # 8000/256 = 31.25 up; 2000/64 = 31.25 down; 10000/10/64 = 15.6 steps; a tenth of 31 = 3
    assert result.stages == (Stage("short", 32, 256, 32, 2e-3, 16), Stage("long", 64, 64, 31, 1e-3, 3))
    assert result.source == "given by the user"
    assert result.schedule() == schedules.Stages(
        ((schedules.PolynomialDecay(2e-3, 32, 16), 32), (schedules.PolynomialDecay(1e-3, 31, 3), 31))
    )


def test_overrides() -> None:
    result = plan("bert", 256, samples=256_000, base_batch_size=64, base_learning_rate=1e-3, base_warmup=1 / 16)
    assert [(s.steps, s.learning_rate, s.warmup_steps) for s in result.stages] == [(900, 2e-3, 250), (100, 2e-3, 0)]
    assert result.source.endswith("settings of the user")
    assert plan("bert", 512, samples=256_000).source.endswith("for the user's samples")
    half_rate = plan("bert", 512, base_learning_rate=2.5e-3)
    assert half_rate.source == result.source
    assert half_rate.stages[0].learning_rate == plan("bert", 512).stages[0].learning_rate / 2
    assert plan(WORKLOADS["bert"], 512) == plan("bert", 512)


def test_linear_lr_is_goyals_rule() -> None:
    assert linear_lr(8_192, 256, 0.1) == 3.2
    assert linear_lr(256, 256, 0.1) == 0.1


@given(batch=st.integers(1, 1 << 20), base=st.integers(1, 1 << 20), rate=st.floats(1e-6, 10))
def test_the_rules_are_proportional(batch: int, base: int, rate: float) -> None:
    assert sqrt_lr(base, base, rate) == linear_lr(base, base, rate) == linear_epoch_warmup(base, base, rate) == rate
    assert sqrt_lr(4 * batch, base, rate) == pytest.approx(2 * sqrt_lr(batch, base, rate), rel=EXACT)
    assert linear_lr(4 * batch, base, rate) == pytest.approx(4 * linear_lr(batch, base, rate), rel=EXACT)
    back = sqrt_lr(base, batch, sqrt_lr(batch, base, rate))
    assert back == pytest.approx(rate, rel=1e-14)


@given(first=st.integers(1, 147_455), second=st.integers(1, 163_839))
def test_every_accepted_batch_makes_a_sound_plan(first: int, second: int) -> None:
    result = plan("bert", (first, second))
    for stage, share in zip(result.stages, (460_800_000, 51_200_000), strict=True):
        assert 0 <= stage.warmup_steps < stage.steps
        # to one batch, but for the mixed run whose counts are the paper's
        assert abs(stage.samples - share) < stage.batch_size or (first, second) == (65_536, 32_768)
    rate = result.schedule()
    assert rate(0) == 0
    assert rate(result.total_steps) == 0
    assert max(rate(stage.warmup_steps) for stage in result.stages) <= result.stages[0].learning_rate


@pytest.mark.parametrize(
    ("workload", "batch", "most"),
    [("bert", (10**6, 512), 147_455), ("bert", (512, 10**6), 163_839), ("resnet50", 10**6, 147_448)],
)
def test_the_largest_batch_named_by_the_error_is_the_largest(workload: str, batch: int, most: int) -> None:
    with pytest.raises(ValueError, match=rf"\[1, {most}\].*Nearest accepted: {most}.*32768"):
        plan(workload, batch)

    def at(value: int) -> object:
        return plan(workload, tuple(value if b == 10**6 else b for b in batch) if isinstance(batch, tuple) else value)

    at(most)
    with pytest.raises(ValueError, match="would not end"):
        at(most + 1)


def test_a_batch_beyond_the_table_says_so() -> None:
    assert "no row of the paper's table" in plan("bert", 3_000).notes[0]
    assert "2,048" in plan("bert", 2_500).notes[0]
    assert "Batch 1,000: no row" in plan("bert", (65_536, 1_000)).notes[0]
    assert "the nearest row is 32,768" in plan("bert", (65_536, 1_000)).notes[1]
    assert not any("no row" in note for note in plan("bert", 3_000, base_learning_rate=1e-3).notes)
    for table, workload in ((BERT, "bert"), (RESNET, "resnet50")):
        for batch, *_ in table:
            assert not any("no row" in note for note in plan(workload, batch).notes)


def test_a_phase_may_be_one_step_long() -> None:
    assert [stage.steps for stage in plan("bert", 50, samples=500).stages] == [9, 1]
    with pytest.raises(ValueError, match=r"at most the samples of that phase, 1/10 of 500, got 51"):
        plan("bert", 51, samples=500)


def test_notes_go_with_what_they_are_about() -> None:
    def said(*args: object, **settings: object) -> str:
        return " ".join(plan(*args, **settings).notes)  # type: ignore[arg-type]

    assert "One curve over all stages" in said("bert", 512)
    assert "warms up again" in said("bert", 512, rewarmup=True)
    assert "weight decay" not in said("bert", 512)
    assert "weight decay 1.5" in said("resnet50", 512)
    assert "stage" not in said("resnet50", 512)


BAD = [
    (lambda: plan("bart", 512), r"workload must be one of bert, resnet50, got 'bart'; did you mean 'bert'\?"),
    (lambda: plan("xyz", 512), r"workload must be one of bert, resnet50, got 'xyz'$"),
    (lambda: plan("bert", 0), r"batch_size must be an integer in \[1, inf\), got 0"),
    (lambda: plan("bert", "32K"), r"batch_size must be one integer or one for each of \(seq128, seq512\), got '32K'"),
    (lambda: plan("bert", (1, 2, 3)), r"batch_size must be one integer .* got \(1, 2, 3\)"),
    (lambda: plan("bert", 512.0), r"batch_size .* got 512.0"),
    (lambda: plan("resnet50", (512, 256)), r"one for each of \(train\), got \(512, 256\)"),
    (
        lambda: plan("bert", 512, recipe="nvida"),
        r"recipe must be one of sqrt, nvidia, got 'nvida'; did you mean 'nvidia'",
    ),
    (lambda: plan("bert", 512, recipe="nvidia"), r"recipe 'nvidia' .* batch_size=\(512, 512\)$"),
    (
        lambda: plan("bert", (65_536, 32_768), recipe="nvidia", samples=10**9),
        r"recipe 'nvidia' .* got samples=1000000000$",
    ),
    (lambda: plan("bert", (1_024, 512), rewarmup=False), r"rewarmup must be True or None .* got False"),
    (lambda: plan("bert", 64, samples=500), r"batch_size of seq512 must be at most .* 1/10 of 500, got 64"),
    (lambda: plan("bert", 64, samples=0), r"samples must be an integer in \[1, inf\), got 0"),
    (lambda: plan("bert", 512, base_learning_rate=-1.0), r"base_learning_rate must be in \(0, inf\), got -1.0"),
    (lambda: plan("bert", 512, base_warmup=1.5), r"base_warmup must be a share of the run in \(0, 1\), got 1.5"),
    (
        lambda: plan("bert", 512, base_batch_size=64),
        r"base_batch_size=64 must come with base_learning_rate and base_wa",
    ),
    (lambda: plan("bert", 512, base_batch_size=64, base_warmup=0.1), r"base_batch_size=64 must come with"),
    (lambda: plan("bert", 512, base_batch_size=64, base_learning_rate=0.1), r"base_batch_size=64 must come with"),
    (lambda: replace(WORKLOADS["bert"], base_warmup=0), r"base_warmup .* got 0$"),
    (lambda: replace(WORKLOADS["bert"], base_warmup=1), r"base_warmup .* got 1$"),
    (
        lambda: replace(WORKLOADS["bert"], phases=(Phase("a", 1, Fraction(1)), Phase("b", 1, Fraction(0)))),
        r"phases must each have a share in \(0, 1\]",
    ),
    (lambda: sqrt_lr(0, 1, 1.0), r"batch_size .* got 0"),
    (lambda: linear_lr(1, 0, 1.0), r"base_batch_size .* got 0"),
    (lambda: linear_epoch_warmup(1, 1, 0.0), r"base_warmup .* got 0.0"),
    (lambda: WORKLOADS["bert"].warmup_epochs(512), r"epochs must be set .* 'bert' has none"),
    (lambda: replace(WORKLOADS["bert"], curve="cosine"), r"curve must be .* got 'cosine'"),
    (lambda: replace(WORKLOADS["bert"], phases=WORKLOADS["bert"].phases[:1]), r"add up to 1, got \[9/10\]"),
]


@pytest.mark.parametrize(("build", "message"), BAD, ids=[message for _, message in BAD])
def test_an_error_names_argument_value_and_range(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()  # type: ignore[operator]


def test_plans_are_values() -> None:
    result = plan("bert", (65_536, 32_768))
    assert pickle.loads(pickle.dumps(result)) == result
    assert hash(result) == hash(plan("bert", (65_536, 32_768)))
    assert result != plan("bert", (65_536, 32_768), recipe="nvidia")
    with pytest.raises(FrozenInstanceError):
        result.stages[0].steps = 1  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        WORKLOADS["bert"].samples = 1  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        WORKLOADS["bert"].phases[0].share = Fraction(1)  # type: ignore[misc]


def test_a_printed_plan_fits_a_terminal_and_says_whose_numbers_it_shows() -> None:
    text = str(plan("bert", (65_536, 32_768), recipe="nvidia"))
    assert max(map(len, text.splitlines())) < 80
    for piece in ("8,599 steps", "seq128", "65,536", "7,037", "6.000e-03", "2,000", "NVIDIA", "as printed"):
        assert piece in text
    assert "a new one for each stage" in text
    assert "goes on" not in text
    single = str(plan("bert", 512))
    assert [line.split()[-2:] for line in single.splitlines()[2:4]] == [["6.250e-04", "3,125"], ["goes", "on"]]
    assert str(plan("resnet50", 512)).splitlines()[2].split()[:2] == ["train", "-"]
    assert "one for the whole run" in single
    assert "goes on" not in str(plan("bert", 512, rewarmup=True))
