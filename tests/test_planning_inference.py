"""Plans to answer questions on chips that are not there, and the kernels of attention compiled for them.

All programs of a scaled-down model with the published models' numbers of tokens, compiled for real TPUs:
`pytest -m slow tests/test_planning_inference.py` (minutes).
"""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from read_jax import cli
from read_jax.config import ReadConfig
from read_jax.errors import ConfigError
from read_jax.models.attention import attention, packed_attention
from read_jax.models.kernels import Packed
from read_jax.planning.chips import CHIPS, GIB, group_topology, topology_devices
from read_jax.planning.compiler import Memory
from read_jax.planning.hlo import Traffic, collectives
from read_jax.planning.inference import InferencePlan, Load, Stage, plan_inference
from read_jax.planning.tables import inference_text
from read_jax.sharding import MeshConfig, make_mesh, on_mesh, spec
from tests.test_planning import LOOPS

MIB = 2**20


def plan(*stages: Stage) -> InferencePlan:
    return InferencePlan("serve", "v5e:4x4", CHIPS["v5e"], 4, Load(), stages)


def stage(name="generate", peak=2.0 * GIB, **changes) -> Stage:
    made = Stage(
        name, Memory(GIB, GIB, MIB, peak), 197e12, 819e9 / 2, {"all-reduce": Traffic(64, 1.8e10)}, 7.0
    )
    return dataclasses.replace(made, **changes)


@pytest.mark.parametrize(
    "machine,chips,wanted",
    [
        ("v5e:4x4", 1, "v5e:1x1"),
        ("v5e:16x16", 4, "v5e:2x2"),
        ("v5e:2x4", 8, "v5e:2x4"),
        ("v5p:2x2x4", 2, "v5p:2x1x1"),
        ("v6e:4x4", 4, "v6e:2x2"),
    ],
)
def test_a_group_is_a_part_of_one_host(machine, chips, wanted):
    assert group_topology(machine, chips) == wanted


@pytest.mark.parametrize("machine,chips", [("v5e:4x4", 8), ("v5e:4x4", 3), ("v5e:1x1", 4)])
def test_a_group_that_no_host_has_is_refused(machine, chips):
    with pytest.raises(ConfigError, match=rf"on {machine} by 1, 2, 4, not {chips} of them"):
        group_topology(machine, chips)


def test_a_loop_that_ends_when_its_answers_do_counts_as_often_as_it_may_run():
    text = LOOPS.replace('backend_config={"known_trip_count":{"n":"5"}}', "")
    assert collectives(text, open_rounds=100)["all-gather"].number == 100
    assert collectives(text)["all-gather"].number == 1


def test_a_plan_says_whether_it_fits_and_how_fast_it_can_be():
    good = plan(stage("encode", peak=GIB), stage())
    text = inference_text(good)
    assert text.startswith("fits: yes")
    assert "13.75 GiB to spare" in text
    # each is bound by its arithmetic: 1 s; 8 pictures, 32 questions
    assert "at least 2.00 s: at most 4.0 pictures or 16.0 answers per second and group" in text
    assert json.loads(json.dumps(good.to_dict()))["stages"][1]["times"]["memory"] == 0.5
    bad = plan(stage(peak=20 * GIB))
    assert inference_text(bad).startswith("fits: no")
    assert "4.25 GiB too much" in inference_text(bad)


@pytest.mark.parametrize(
    "arguments,said",
    [
        (("evaluate", "--mesh", "fsdp=2"), "by --mesh tensor=N, not fsdp=2"),
        (("evaluate", "--new-tokens", "9"), "--new-tokens says nothing about a plan to evaluate"),
        (("serve", "--search"), "--search says nothing about a plan to serve"),
        (("--questions", "3"), "--questions says nothing about a plan to train"),
        (("serve", "--questions", "0"), "questions must be positive"),
    ],
)
def test_what_makes_no_plan_is_refused(arguments, said, capsys):
    common = ["--config", "nano_scenes:runlocal", "--topology", "v5e:4x4"]
    what = [arguments[0]] if arguments[0][0] != "-" else []
    assert cli.main(["plan", *what, *common, *arguments[len(what) :]]) == 1
    assert said in capsys.readouterr().err


def compiled_on(topology, function, *shapes, names):
    """The program over bfloat16 operands of these shapes, shared as the names say, for four chips."""
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), topology_devices(topology))
    place = NamedSharding(mesh, spec(names, mesh))
    operands = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place) for shape in shapes]
    return jax.jit(on_mesh(function, mesh)).lower(*operands).compile()


def test_sams_global_attention_keeps_its_scores_on_the_chip(compiler):
    heads, queries, values = 16, 80 + 2 * 64, 80
    shapes = [(2, 4096, heads, size) for size in (queries, queries, values)]
    made = compiled_on("v5e:2x2", lambda *a: attention(*a, scale=1.0), *shapes, names=("batch",))
    text = made.as_text()
    assert text.count("tpu_custom_call") == 1
    assert not collectives(text)  # every chip has its own pictures
    # the scores of one picture are 1 GiB
    assert made.memory_analysis().temp_size_in_bytes < 64 * MIB


def test_the_gradient_of_packed_attention_keeps_its_scores_on_the_chip(compiler):
    layout, heads, size = Packed(613, 3, 256), 32, 128

    def gradient(q, k, v):
        return jax.grad(lambda *a: packed_attention(*a, layout).astype(jnp.float32).sum(), (0, 1, 2))(q, k, v)

    shapes = [(2, layout.tokens, heads, size)] * 3
    made = compiled_on("v5e:2x2", gradient, *shapes, names=("batch", None, "heads"))
    text = made.as_text()
    assert text.count("tpu_custom_call") >= 2
    assert not collectives(text)  # every chip has its own pictures and heads
    # the scores of one picture's heads on a chip are 120 MiB
    assert made.memory_analysis().temp_size_in_bytes < 32 * MIB


@pytest.fixture(scope="module")
def thin():
    """READ-7B with few layers and narrow ones, but all its tokens."""
    model = ReadConfig.preset("read-7b")
    change = dataclasses.replace
    llama = change(
        model.llama, num_layers=2, hidden_size=512, intermediate_size=1024, num_heads=4, num_kv_heads=4
    )
    clip = change(model.clip, num_layers=3, hidden_size=256, intermediate_size=512, num_heads=4)
    sam = change(
        model.sam, depth=2, embed_dim=160, mlp_dim=320, num_heads=2, global_attn_indexes=(1,), out_chans=256
    )
    return model.replace(llama=llama, clip=clip, sam=sam)


@pytest.mark.slow
@pytest.mark.parametrize("mode,group", [("evaluate", 1), ("serve", 2)])
def test_a_scaled_down_model_answers_within_the_memory_of_its_chips(compiler, thin, mode, group):
    made = plan_inference(thin, "v5e:4x4", mode, group, Load(pictures=2, questions=2, new_tokens=64))
    assert made.fits
    assert [s.name for s in made.stages][:2] == ["encode", "prefix"]
    assert made.stages[-1].name == "predict"
    for one in made.stages:
        assert one.memory.temporaries < 160 * MIB, one.name
        assert bool(one.traffic) == (group > 1 and one.name != "predict"), one.name
