"""Every recipe loads, builds its model and optimizer abstractly, names its score, and has a small variant."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from read_jax.config import ReadConfig, SamConfig, SaspConfig
from read_jax.data.recipes import RECIPES
from read_jax.data.sources import FAMILIES
from read_jax.errors import ConfigError
from read_jax.models.read import Read
from read_jax.training.config import StartConfig, load_config, recipe, recipe_names, recipes_folder
from read_jax.training.lora import LoraConfig, add_adapters
from read_jax.training.optimizer import OptimizerConfig, make_optimizer
from read_jax.training.step import init_state, split_model

NAMES = recipe_names()
PARAMETERS = {"7b": (6.9e9, 7.9e9), "13b": (13e9, 14.5e9)}


def architecture(config):
    """Of the model folder that a recipe starts from, judging by its name."""
    if config.start.scratch:
        return config.start.scratch
    if config.start.model == "nano":
        return load_config("nano_scenes").start.scratch
    size = re.search(r"\d+b", config.start.model).group()
    model = ReadConfig.preset(f"sesame-{size}")
    if sam := re.search(r"sam-([blh])$", config.start.model):
        model = model.replace(sam=SamConfig.preset(f"vit_{sam.group(1)}"))
    return model.replace(sasp=config.start.sasp_config(model.sasp))


def test_there_is_a_recipe_for_every_published_number():
    assert {
        "read_7b_reasonseg",
        "read_7b_reasonseg_finetuned",
        "read_13b_reasonseg",
        "read_7b_refcoco",
        "read_7b_fprefcoco",
        "lisa_7b",
        "sesame_7b",
        *(f"ablation_sasp_{kind}" for kind in ("off", "discrete", "continuous")),
        *(f"ablation_sam_{size}" for size in "blh"),
    } <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_it_loads_and_builds_its_model_and_optimizer(name):
    config = load_config(name)

    def build():
        model = Read(architecture(config), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        if config.lora:
            add_adapters(model.llama, config.lora, nnx.Rngs(0))
        _, params, frozen = split_model(model, config.trainable)
        return params, frozen, init_state(params, make_optimizer(config.optimizer), config.step)

    params, frozen, state = nnx.eval_shape(build)
    learned, kept = (sum(math.prod(x.shape) for x in jax.tree.leaves(part)) for part in (params, frozen))
    assert learned > 0
    assert len(jax.tree.leaves(state)) > 2 * len(jax.tree.leaves(params))
    if size := re.search(r"\d+b$", config.start.model.removesuffix("-sam-b")):
        low, high = PARAMETERS[size.group()]
        assert low < learned + kept < high


@pytest.mark.parametrize("name", NAMES)
def test_its_data_are_known(name):
    config = load_config(name)
    assert config.data.mixture in RECIPES or config.data.rates
    for source in (*config.data.rates, config.validation.dataset):
        assert not source or source.endswith(".jsonl") or source.partition("|")[0] in FAMILIES


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_to_expect_and_where_from(name):
    path = recipes_folder() / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert "Expected" in module.__doc__
    assert (
        "the paper" in module.__doc__ or "no score" in module.__doc__ or "measured" in module.__doc__.lower()
    )


@pytest.mark.parametrize("name", NAMES)
def test_its_small_variant_keeps_what_makes_it(name):
    config, small = load_config(name), load_config(f"{name}:runlocal")
    assert small.start.scratch is not None
    assert small.losses == config.losses
    assert small.optimizer.schedule == config.optimizer.schedule
    if config.start.sasp:
        assert (small.start.sasp, small.start.continuous) == (config.start.sasp, config.start.continuous)
    assert small.data.rates == {"scenes|train": 1.0}
    assert small.total_updates <= 10
    architecture(small)  # the points fit its grid


def test_the_ablations_differ_from_the_recipe_in_one_thing():
    base = load_config("read_7b_reasonseg")
    assert load_config("ablation_sasp_continuous") == base
    off, discrete = load_config("ablation_sasp_off"), load_config("ablation_sasp_discrete")
    assert not off.start.sasp_config(SaspConfig()).enabled
    assert not discrete.start.sasp_config(SaspConfig()).continuous
    few = SaspConfig(num_points=10, down_sample=1)  # a model's own points, at whole cells and as they were
    assert StartConfig(continuous=False).sasp_config(few) == dataclasses.replace(few, continuous=False)
    assert StartConfig().sasp_config(dataclasses.replace(few, continuous=False)).continuous is False
    for other in (off, discrete, *(load_config(f"ablation_sam_{size}") for size in "blh")):
        assert (other.data, other.optimizer, other.losses) == (base.data, base.optimizer, base.losses)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (
            "read_7b_reasonseg",
            "optimiser.learning_rate=1",
            r"'optimiser'; the nearest known key is 'optimizer'",
        ),
        ("read_7b_reasonseg", "optimizer.learning_rat=1", r"'learning_rat'.*nearest.*'learning_rate'"),
        ("read_7b_reasonseg", "optimizer.learning_rate=fast", r"learning_rate must be float, not 'fast'"),
        ("read_7b_reasonseg", "data.global_batch=7.5", r"global_batch must be int"),
        ("read_7b_reasonseg", "dtype=float16", r"dtype must be one of 'float32', 'bfloat16'"),
        ("read_7b_reasonseg", "step.micro_batches=7", r"160 pictures cannot be cut into 7"),
        ("read_7b_reasonseg", "optimizer.learning_rate", r"write KEY=VALUE"),
        ("read_7b_reasonseg", "dtype.x=1", r"config\.dtype is a value"),
        ("read_7b_reasonsegg", None, r"Did you mean read_7b_reasonseg"),
        ("read_7b_reasonseg:runlocally", None, r"no variant 'runlocally'"),
        ("read_7b_reasonseg", "lora=None", r"adapters"),
        ("read_7b_reasonseg", "updates=8000", r"nothing is learned in 8000 updates after the first 5000"),
        ("read_7b_reasonseg", "start.scratch.llama.hidden_sise=64", r"'hidden_sise'.*nearest.*'hidden_size'"),
    ],
)
def test_what_is_wrong_is_named_with_the_nearest_known(name, change, words):
    with pytest.raises(ConfigError, match=words):
        load_config(name, [change] if change else [])


def test_changes_are_taken_as_in_python_and_texts_as_they_are():
    config = load_config(
        "read_7b_reasonseg",
        [
            "optimizer.learning_rate=1e-5",
            "data.mixture=",
            'data.rates={"scenes|train": 2, "mine.jsonl": 1}',
            "data.mask_canvas=(64, 96)",
            "start.sasp=None",
            "step.max_gradient_norm=inf",
            "step.remat=dots",
            "updates=3",
        ],
    )
    assert config.optimizer.learning_rate == 1e-5
    assert config.data.rates == {"scenes|train": 2, "mine.jsonl": 1}
    assert config.data.mask_canvas == (64, 96)
    assert config.start.sasp is None
    assert config.step.max_gradient_norm == math.inf
    assert config.step.remat == "dots"
    assert config.total_updates == 3


def test_a_file_of_ones_own_may_build_on_a_recipe(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from read_jax.training.config import recipe\n"
        "def get_config():\n"
        "    config = recipe('read_7b_reasonseg')\n"
        "    config.lora.rank = 4\n"
        "    return config\n"
    )
    assert load_config(str(path)).lora.rank == 4
    path.write_text(path.read_text().replace("lora.rank", "lora.ranks"))
    with pytest.raises(ConfigError, match=r"mine\.py gives no configuration: .*ranks"):
        load_config(str(path))


def test_a_file_may_give_only_what_differs_from_the_defaults(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n"
        "    return ConfigDict({'updates': 3, 'lora': {'rank': 4}, 'data': {'mixture': 'reasonseg'}})\n"
    )
    config = load_config(str(path), ["lora.alpha=3", "optimizer.b2=0.9"])
    assert (config.updates, config.lora, config.data.mixture) == (3, LoraConfig(4, 3.0), "reasonseg")
    assert config.optimizer == OptimizerConfig(b2=0.9)
    assert load_config(f"{path}:runlocal").start.scratch is not None
    path.write_text(path.read_text().replace("rank", "rnk"))
    with pytest.raises(ConfigError, match=r"config\.lora has no key 'rnk'; the nearest known key is 'rank'"):
        load_config(str(path), ["lora.alpha=3"])


def test_a_source_is_added_by_its_name_whatever_is_in_it():
    config = load_config("nano_scenes", ["data.rates.scenes|val=1", "data.rates./my.data/a.jsonl=2.5"])
    assert config.data.rates["scenes|val"] == 1 and config.data.rates["/my.data/a.jsonl"] == 2.5
    assert config.data.rates["scenes|train"] == 4.0


def test_a_recipe_does_not_change_another():
    changed = recipe("read_7b_reasonseg")
    changed.lora.rank = 99
    assert recipe("read_7b_reasonseg").lora.rank == 8
