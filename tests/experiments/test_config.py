"""Configurations: what goes to JSON comes back, overrides are typed, and a wrong key names its neighbour."""

import dataclasses
import json

import pytest

from largebatch.errors import UserError
from largebatch.experiments import recipes
from largebatch.experiments.config import from_json, keys, override, to_json


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_survives_json(name):
    config = recipes.get(name)
    assert config.recipe == name
    assert from_json(json.loads(json.dumps(to_json(config)))) == config


@pytest.mark.parametrize(
    ("assignment", "path", "value"),
    [
        ("optim.lr=1e-3", ("optim", "lr"), 1e-3),
        ("optim.betas=0.8,0.9", ("optim", "betas"), (0.8, 0.9)),
        ("optim.exclude=bias", ("optim", "exclude"), ("bias",)),
        ("optim.exclude=", ("optim", "exclude"), ()),
        ("optim.bias_correction=false", ("optim", "bias_correction"), False),
        ("max_grad_norm=none", ("max_grad_norm",), None),
        ("max_grad_norm=2", ("max_grad_norm",), 2.0),
        ("seed=1e3", ("seed",), 1000),
        ("seed=9007199254740993", ("seed",), 2**53 + 1),
        ("model.name=mini", ("model", "name"), "mini"),
    ],
)
def test_an_override_has_its_fields_type(assignment, path, value):
    node = override(recipes.get("bert-tiny"), [assignment])
    for part in path:
        node = getattr(node, part)
    assert node == value
    assert type(node) is type(value)


def test_a_stage_is_named_by_its_number():
    config = override(recipes.get("bert-tiny"), ["stages.1.steps=7", "stages.1.micro_batch_size=8"])
    assert (config.stages[1].steps, config.stages[1].micro_batch_size) == (7, 8)
    assert config.stages[0] == recipes.get("bert-tiny").stages[0]


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optim.lrr=1", r"there is no setting optim.lrr; the nearest is optim.lr"),
        ("stages.0.step=1", r"no setting stages.0.step; the nearest is stages.0.steps"),
        ("stages.9.steps=1", r"no setting stages.9.steps; the nearest is stages"),
        ("optim.lr", r"--set optim.lr: write KEY=VALUE"),
        ("optim.lr=fast", r"optim.lr=fast is not a number"),
        ("seed=1.5", r"seed=1.5 is not a whole number"),
        ("tensorboard=maybe", r"tensorboard=maybe is not true or false"),
        ("optim.betas=0.9", r"optim.betas takes 2 values"),
        ("kind=squad", r"there is no setting kind"),
    ],
)
def test_a_wrong_override_is_one_clear_line(assignment, message):
    with pytest.raises(UserError, match=message) as error:
        override(recipes.get("bert-tiny"), [assignment])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("recipe", "settings", "message"),
    [
        # The default's value, as any other.
        ("bert-large-32768", ["optim.lr=1e-3"], r"optim\.lr has no effect: .* set stages\.0\.learning_rate and so on"),
        ("bert-large-32768", ["stages.0.learning_rate=none", "optim.lr=1e-3"], None),
        ("lenet-mnist", ["stages.0.learning_rate=1e-2"], None),  # the recipe's own optim.lr is nobody's wish
        ("bert-large-32768", ["stages.0.learning_rate=1e-3"], None),
        (
            "bert-large-32768",
            ["stages.1.learning_rate=1e-3"],
            r"stages\.1\.learning_rate has no effect: stages\.1\.sch",
        ),
        (
            "bert-large-32768",
            ["stages.1.warmup_steps=10"],
            r"is continue; set stages\.0\.warmup_steps, or another stages",
        ),
        ("bert-large-32768", ["stages.1.power=2", "stages.1.schedule=triangle"], None),
        ("bert-tiny", ["stages.1.schedule=continue", "stages.1.power=2"], r"stages\.1\.power has no effect"),
        ("bert-tiny", ["optim.lr=1e-3"], None),
    ],
)
def test_rates_that_no_curve_is_made_from_are_refused(recipe, settings, message):
    if message is None:
        override(recipes.get(recipe), settings)
    else:
        with pytest.raises(UserError, match=message):
            override(recipes.get(recipe), settings)


def test_keys_lists_what_override_takes():
    config = recipes.get("bert-tiny")
    assert {"optim.lr", "stages.0.steps", "data.path", "model.name"} <= set(keys(config))
    with_all = [f"{key}=1" for key in keys(config) if key in ("seed", "stages.0.steps", "optim.eps")]
    assert override(config, with_all).optim.eps == 1.0


def test_an_unknown_kind_or_key_in_a_file_is_refused():
    content = to_json(recipes.get("lenet-mnist"))
    with pytest.raises(UserError, match="kind is 'paint'"):
        from_json({**content, "kind": "paint"})
    with pytest.raises(UserError, match="no setting sed; the nearest is seed"):
        from_json({**content, "sed": 1})


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(UserError, match="there is no recipe bert-tini; the nearest is bert-tiny"):
        recipes.get("bert-tini")


def test_the_papers_recipes_have_the_papers_numbers():
    mixed = recipes.get("bert-large-76min")
    assert [stage.steps for stage in mixed.stages] == [7037, 1562]
    assert [stage.batch_size for stage in mixed.stages] == [65536, 32768]
    untuned = recipes.get("bert-large-32768")
    assert [stage.steps for stage in untuned.stages] == [14063, 1562]
    assert untuned.stages[0].learning_rate == 5e-3
    assert dataclasses.replace(mixed, recipe="x").optim.name == "lamb"
