"""Plans to answer questions on chips that are not there, and the kernels of attention compiled for them.

All programs of a scaled-down model with the published models' numbers of tokens, compiled for real TPUs:
`pytest -m slow tests/test_planning_inference.py` (minutes).
"""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from read_jax import cli
from read_jax.config import ReadConfig
from read_jax.errors import ConfigError
from read_jax.geometry import image_geometry, stack_geometries
from read_jax.inference.programs import Programs
from read_jax.models.attention import attention, packed_attention
from read_jax.models.kernels import Packed
from read_jax.models.llama import KeyValues
from read_jax.models.read import Prefix, Read
from read_jax.planning.chips import CHIPS, GIB, group_topology, topology_devices
from read_jax.planning.compiler import Memory
from read_jax.planning.hlo import Traffic, collectives
from read_jax.planning.inference import Counts, InferencePlan, Load, Stage, plan_inference
from read_jax.planning.programs import PROMPT_TOKENS, prefix_length
from read_jax.planning.tables import inference_text
from read_jax.sharding import MeshConfig, make_mesh, on_mesh, spec
from read_jax.weights.checkpoint import model_leaves
from tests.test_planning import LOOPS

MIB = 2**20
DTYPES = pytest.mark.parametrize("dtype", ["bfloat16", "float32"])


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
def test_a_group_is_a_part_of_one_host(compiler, machine, chips, wanted):
    assert group_topology(machine, chips) == wanted


@pytest.mark.parametrize(
    "machine,chips,sizes",
    [
        ("v5e:4x4", 8, "1, 2, 4"),
        ("v5e:4x4", 3, "1, 2, 4"),
        ("v5e:2x4", 3, "1, 2, 4, 8"),
        ("v5e:1x2", 4, "1, 2"),
        ("v5e:1x1", 2, "1"),
    ],
)
def test_a_group_that_no_host_has_is_refused_with_those_that_it_has(compiler, machine, chips, sizes):
    with pytest.raises(ConfigError, match=rf"on {machine} by {sizes}, not {chips} of them"):
        group_topology(machine, chips)


@pytest.mark.parametrize("machine", ["v5e:99x99", "v5e:3x5"])
def test_a_group_of_a_machine_that_there_is_not_is_refused(compiler, machine):
    with pytest.raises(ConfigError, match=rf"the compiler knows no topology '{machine}'"):
        group_topology(machine, 1)


def test_a_loop_that_ends_when_its_answers_do_counts_as_often_as_it_may_run():
    text = LOOPS.replace('backend_config={"known_trip_count":{"n":"5"}}', "")
    assert collectives(text, open_rounds=100)["collective-permute"].number == 300
    assert collectives(text)["collective-permute"].number == 3


def test_a_plan_says_whether_it_fits_and_how_fast_it_can_be():
    good = plan(stage("encode", peak=GIB), stage())
    text = inference_text(good)
    assert text.startswith("fits: yes")
    assert "13.75 GiB to spare" in text
    # each is bound by its arithmetic: 1 s; 8 pictures, 32 questions
    assert (
        "full length, takes at least 2.00 s: at most 4.0 pictures or 16.0 answers per second and group"
        in text
    )
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
        (("serve", "--batch", "16"), "64 questions do not go through together, at most 32 do"),
        (("--questions", "0"), "--questions says nothing about a plan to train"),
        (("--pictures", "0"), "--pictures must be positive"),
    ],
)
def test_what_makes_no_plan_is_refused(arguments, said, capsys):
    common = ["--config", "nano_scenes:runlocal", "--topology", "v5e:4x4"]
    what = [arguments[0]] if arguments[0][0] != "-" else []
    assert cli.main(["plan", *what, *common, *arguments[len(what) :]]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("change", "points"), [([], 30), (["--config.start.sasp=off"], None)])
def test_the_model_that_answers_has_the_points_of_the_run(change, points, monkeypatch, capsys):
    planned = []

    def plan_inference(model, *_):
        planned.append(model.sasp)
        return plan(stage())

    monkeypatch.setattr("read_jax.planning.inference.plan_inference", plan_inference)
    arguments = ["plan", "serve", "--config", "read_7b_reasonseg", "--topology", "v5e:4x4", *change]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.startswith("fits: yes")
    assert [p.num_points if p.enabled else None for p in planned] == [points]


def compiled_on(topology, function, *shapes, names, dtype):
    """The program over operands of these shapes, shared as the names say, for four chips.

    float32 is as inference in it: without shorter products.
    """
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), topology_devices(topology))
    place = NamedSharding(mesh, spec(names, mesh))
    operands = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape in shapes]
    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        return jax.jit(on_mesh(function, mesh)).lower(*operands).compile()


def test_on_one_chip_the_kernel_is_taken_too(compiler):
    mesh = make_mesh(MeshConfig(), topology_devices("v5e:1x1"))
    place = NamedSharding(mesh, spec((), mesh))
    operands = [jax.ShapeDtypeStruct((1, 4096, 2, 128), jnp.bfloat16, sharding=place)] * 3
    assert "tpu_custom_call" in jax.jit(on_mesh(attention, mesh)).lower(*operands).compile().as_text()


def test_clips_heads_stay_where_they_are(compiler):
    shape = (2, 577, 16, 64)
    made = compiled_on("v5e:2x2", attention, *[shape] * 3, names=("batch", None, "heads"), dtype="bfloat16")
    assert not collectives(made.as_text())


@DTYPES
def test_sams_global_attention_keeps_its_scores_on_the_chip(compiler, dtype):
    heads, queries, values = 16, 80 + 2 * 64, 80
    shapes = [(2, 4096, heads, size) for size in (queries, queries, values)]
    made = compiled_on("v5e:2x2", lambda *a: attention(*a, scale=1.0), *shapes, names=("batch",), dtype=dtype)
    text = made.as_text()
    assert text.count("tpu_custom_call") == 1
    assert not collectives(text)  # every chip has its own pictures
    # the scores of one picture are 1 GiB
    assert made.memory_analysis().temp_size_in_bytes < (64 if dtype == "bfloat16" else 256) * MIB


@DTYPES
def test_the_gradient_of_packed_attention_keeps_its_scores_on_the_chip(compiler, dtype):
    layout, heads, size = Packed(613, 3, 256), 32, 128

    def gradient(q, k, v):
        return jax.grad(lambda *a: packed_attention(*a, layout).astype(jnp.float32).sum(), (0, 1, 2))(q, k, v)

    shapes = [(2, layout.tokens, heads, size)] * 3
    made = compiled_on("v5e:2x2", gradient, *shapes, names=("batch", None, "heads"), dtype=dtype)
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
    weights = sum(np.prod(leaf.shape) * 2 for leaf in model_leaves(thin).values())
    for one in made.stages:
        # plain, one picture's scores in SAM's global layer would be 128 MiB
        assert one.memory.temporaries < 96 * MIB, one.name
        assert one.memory.peak > weights / group, one.name  # all of them stay on the chips
        assert bool(one.traffic) == (group > 1 and one.name != "predict"), one.name


@pytest.fixture(scope="module")
def shallow(thin):
    """One layer of LLaMA: what a loop's body counts once, as compilers do, is then all of it."""
    return thin.replace(llama=dataclasses.replace(thin.llama, num_layers=1))


@pytest.mark.parametrize("name", ["prefix", "teacher_force", "generate", "predict"])
def test_operations_are_those_of_the_program(shallow, name, monkeypatch):
    monkeypatch.setenv("READ_JAX_ATTENTION", "plain")  # what is in a kernel the count does not see
    load = Load(
        pictures=1, questions=2, tokens=64, new_tokens=2
    )  # after the first token one round of the loop
    graphdef, params = nnx.split(
        nnx.eval_shape(lambda: Read(shallow, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    )
    programs = Programs(graphdef, params, end_id=2, exact=False)
    tokens, width = prefix_length(shallow), shallow.llama.hidden_size
    keys = jax.ShapeDtypeStruct(
        (1, 1, tokens, shallow.llama.num_kv_heads, shallow.llama.head_dim), jnp.bfloat16
    )
    prefix = Prefix(jax.ShapeDtypeStruct((1, tokens, width), jnp.bfloat16), KeyValues(keys, keys))
    asked, rows = np.zeros((1, 2, 64), np.int32), np.zeros((1, 2), np.int32)
    geometry = stack_geometries(
        [image_geometry(480, 640, shallow.sasp, shallow.clip.grid_size, shallow.sam.image_size)] * 2
    )
    image_tokens = jax.ShapeDtypeStruct((1, 576, width), jnp.bfloat16)
    embedding = jax.ShapeDtypeStruct((2, 64, 64, 256), jnp.bfloat16)
    seg = [jax.ShapeDtypeStruct((2, *shape, width), jnp.bfloat16) for shape in ((), (576,))]
    arguments = {
        "prefix": (np.zeros(tokens, np.int32), image_tokens, PROMPT_TOKENS),
        "teacher_force": (prefix, asked),
        "generate": (prefix, asked, rows, rows, 2, None),
        "predict": (*seg, embedding, geometry),
    }
    counted = programs.lower(name, *arguments[name]).cost_analysis()["flops"]
    ours, _ = getattr(Counts(shallow, load, 1), name)()
    # the plain program computes the scores that the mask hides too
    assert 0.89 * counted < ours < 1.02 * counted
