"""Which layers decay and adapt: by name, by the module's class, under every name that a tied parameter has.

Guards a slip that no loss curve shows: a LayerNorm that decays, or a decoder that no longer adapts since it is tied to
something whose name says bias.
"""

import re
from typing import Any

import pytest
import torch
from torch import nn

from largebatch import LAMB, param_groups
from largebatch.optim import groups as module


def names(model: nn.Module, **settings: Any) -> tuple[list[str], list[str]]:
    """Return the names of those that adapt, and of those that do not."""
    found: dict[bool, list[str]] = {True: [], False: []}
    for group in param_groups(model, **settings):
        assert [id(dict(model.named_parameters())[name]) for name in group["param_names"]] == list(
            map(id, group["params"])
        )
        found[group["adapt"]] = group["param_names"]
    return found[True], found[False]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.bn1 = nn.BatchNorm1d(4)
        self.dense = nn.Linear(4, 4)
        self.LayerNorm = nn.LayerNorm(4)
        self.downsample = nn.Sequential(nn.Conv1d(4, 4, 1, bias=False), nn.BatchNorm1d(4))
        self.decoder = nn.Linear(4, 5)
        self.decoder.weight = self.embedding.weight


def test_biases_and_whatever_normalises_neither_decay_nor_adapt() -> None:
    adapted, excluded = names(Net())
    assert adapted == ["embedding.weight", "dense.weight", "downsample.0.weight"]
    assert excluded == [
        *("bn1.weight", "bn1.bias", "dense.bias", "LayerNorm.weight", "LayerNorm.bias"),
        *("downsample.1.weight", "downsample.1.bias", "decoder.bias"),
    ]


def test_the_groups_say_what_is_done_to_them() -> None:
    first, second = param_groups(Net(), weight_decay=0.3)
    assert (first["weight_decay"], first["adapt"]) == (0.3, True)
    assert (second["weight_decay"], second["adapt"]) == (0.0, False)
    assert param_groups(Net())[0]["weight_decay"] == 0.01
    assert param_groups(Net(), weight_decay=0)[0]["weight_decay"] == 0
    assert set(first) == {"params", "param_names", "weight_decay", "adapt"}


def test_every_optimizer_takes_them() -> None:
    model = Net()
    for make in (LAMB, torch.optim.AdamW, torch.optim.SGD):
        optimizer = make(param_groups(model), lr=0.1)
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("class_name", "normalises"),
    [("LayerNorm", True), ("BatchNorm2d", True), ("LlamaRMSNorm", True), ("norm", True), ("Normalizer", False)],
)
def test_normalisation_is_known_by_the_name_of_its_class(class_name: str, normalises: bool) -> None:
    layer = type(class_name, (nn.Module,), {})()
    layer.gain = nn.Parameter(torch.ones(3))
    model = nn.Sequential(layer, nn.Linear(3, 3))
    assert ("0.gain" in names(model)[1]) == normalises
    assert "0.gain" in names(model, exclude=("bias",))[0]  # which does not ask for it
    if normalises:
        assert names(model, exclude=("norm",)) == (["1.weight", "1.bias"], ["0.gain"])


class LN(nn.LayerNorm):
    """A user's own name for it."""


def test_normalisation_is_known_by_the_class_it_derives_from() -> None:
    assert names(nn.Sequential(nn.Linear(4, 4), LN(4))) == (["0.weight"], ["0.bias", "1.weight", "1.bias"])


def test_matrices_of_what_derives_from_a_users_norm_adapt() -> None:
    before = type("PreNorm", (nn.Module,), {})
    attention = type("Attention", (before,), {})()
    attention.qkv = nn.Parameter(torch.ones(3, 9))
    attention.scale = nn.Parameter(torch.ones(3))
    assert names(attention) == (["qkv"], ["scale"])


@pytest.mark.parametrize("class_name", ["BatchNormAct2d", "EvoNorm2dS0", "MambaRMSNormGated", "NormLinear"])
def test_the_vectors_of_a_module_with_norm_in_its_name_are_gains(class_name: str) -> None:
    layer = type(class_name, (nn.Module,), {})()
    layer.gain = nn.Parameter(torch.ones(3, 1, 1))
    layer.matrix = nn.Parameter(torch.ones(3, 3))
    assert names(layer) == (["matrix"], ["gain"])


def test_what_lies_within_a_module_called_norm_is_not_of_it() -> None:
    around = type("PreNorm", (nn.Module,), {})()
    around.gain = nn.Parameter(torch.ones(3))
    around.dense = nn.Linear(3, 3)
    assert names(around) == (["dense.weight"], ["gain", "dense.bias"])


def test_patterns_are_searched_in_names() -> None:
    adapted, excluded = names(Net(), exclude=(r"^dense\.w", "embed"))
    assert excluded == ["embedding.weight", "dense.weight"]
    assert "dense.bias" in adapted
    assert names(Net(), exclude=())[1] == []
    with pytest.raises(ValueError, match="exclude='EMBED' matches no parameter"):
        param_groups(Net(), exclude=("EMBED",))  # searched case-sensitively


def test_a_tied_parameter_is_there_once_and_excluded_by_any_of_its_names() -> None:
    assert names(Net(), exclude=("decoder.weight",)) == (
        [name for name, _ in Net().named_parameters() if name != "embedding.weight"],
        ["embedding.weight"],
    )


def test_a_tied_module_is_there_once() -> None:
    shared = nn.Linear(3, 3)
    assert names(nn.Sequential(shared, nn.ReLU(), shared)) == (["0.weight"], ["0.bias"])
    assert names(nn.Sequential(shared, nn.ReLU(), shared), exclude=("2.weight",)) == (["0.bias"], ["0.weight"])
    twice = nn.Module()
    twice.first = twice.second = nn.Parameter(torch.ones(3))
    assert names(twice, exclude=("second",)) == ([], ["first"])


def test_frozen_parameters_are_left_out_and_so_are_empty_groups() -> None:
    model = Net()
    model.dense.weight.requires_grad_(False)
    assert all("dense.weight" not in group for group in names(model))
    assert [group["adapt"] for group in param_groups(nn.Linear(3, 3, bias=False))] == [True]
    assert [group["adapt"] for group in param_groups(nn.LayerNorm(3))] == [False]


def test_the_default_suits_models_without_any_of_it() -> None:
    assert module.DEFAULT_EXCLUDE == ("bias", "LayerNorm", "norm")
    assert names(nn.Linear(3, 3, bias=False)) == (["weight"], [])
    assert names(nn.Linear(3, 3, bias=False), exclude=list(module.DEFAULT_EXCLUDE)) == (["weight"], [])


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (Net(), {"exclude": "bias"}, "exclude='bias': expected a sequence of patterns, such as (\"bias\",)"),
        (Net(), {"weight_decay": -0.1}, "weight_decay=-0.1: expected a number >= 0"),
        (Net(), {"weight_decay": float("nan")}, "weight_decay=nan: expected a number >= 0"),
        (
            Net(),
            {"exclude": ("bias", "gamma")},
            "exclude='gamma' matches no parameter; their names are like embedding.weight, bn1.weight, bn1.bias",
        ),
        (nn.ReLU(), {}, "model: it has no parameter that requires a gradient"),
        (nn.Linear(2, 2).requires_grad_(False), {}, "model: it has no parameter that requires a gradient"),
    ],
)
def test_what_cannot_be_grouped_is_said(model: nn.Module, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        param_groups(model, **settings)
