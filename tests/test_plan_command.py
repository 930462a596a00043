"""`read-jax plan`: what it makes of its options, before anything is compiled."""

from __future__ import annotations

import pytest

from read_jax import cli
from read_jax.planning import inference, plan


class Compiled(Exception):
    """Stands in for minutes of compiling."""


@pytest.fixture
def compiled(compiler, monkeypatch):
    """What is given to the compiler: a list of (config, mesh), or of the chips that share a model."""
    seen = []

    def make_plan(setup, topology, mesh, **_):
        seen.append((setup.config, mesh))
        raise Compiled

    def plan_inference(model, topology, mode, group, load):
        seen.append(group)
        raise Compiled

    monkeypatch.setattr(plan, "make_plan", make_plan)
    monkeypatch.setattr(inference, "plan_inference", plan_inference)
    return seen


def run(*arguments):
    return cli.main(["plan", "--config", "read_7b_reasonseg", "--topology", "v5e:4x4", *arguments])


@pytest.mark.parametrize(
    ("options", "pictures", "parts"),
    [
        (("--batch", "16"), 16, 1),
        (("--batch", "160"), 160, 10),
        (("--batch", "160", "--config.step.micro_batches=5"), 160, 5),
        (("--batch", "640"), 640, 20),  # as many as the recipe has
    ],
    ids=str,
)
def test_a_batch_is_cut_into_parts_that_the_mesh_can_share(options, pictures, parts, compiled):
    with pytest.raises(Compiled):
        run("--mesh", "fsdp=16,tensor=1", *options)
    ((config, mesh),) = compiled
    assert (config.data.global_batch, config.step.micro_batches) == (pictures, parts)
    assert (mesh.fsdp, mesh.tensor) == (16, 1)


def test_without_a_mesh_one_is_suggested(compiled, capsys):
    with pytest.raises(Compiled):
        run("--batch", "16")
    ((_, mesh),) = compiled
    assert mesh.data * mesh.fsdp * mesh.tensor == 16 and mesh.fsdp * mesh.tensor > 1  # 7B on one does not fit
    assert f"this one suits: data={mesh.data},fsdp={mesh.fsdp}" in capsys.readouterr().err


def test_a_search_compiles_the_best_of_the_batches_it_is_given(compiled, capsys):
    with pytest.raises(Compiled):
        run("--search", "--batch", "1,16")  # sixteen chips cannot share one picture
    ((config, mesh),) = compiled
    assert config.data.global_batch == 16 and mesh.data * mesh.fsdp * mesh.tensor == 16
    assert "pictures/s" in capsys.readouterr().out


@pytest.mark.parametrize("batch", ["0", "16,", "many"])
def test_what_is_no_number_of_pictures_is_refused(batch, compiled, capsys):
    with pytest.raises(SystemExit):
        run("--batch", batch)
    assert "are not numbers of pictures" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mesh", "chips"), [("tensor=4", 4), ("fsdp=1,tensor=2", 2), ("data=1,fsdp=1,tensor=1", 1)]
)
def test_to_answer_chips_share_a_model_by_tensor(mesh, chips, compiled):
    with pytest.raises(Compiled):
        run("--mesh", mesh, "evaluate")
    assert compiled == [chips]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--mesh", "fsdp=16,fsdp=4"), "says twice"),
        (("--mesh", "fsdp=4,tensor=4", "serve"), "tensor=N, not fsdp=4,tensor=4"),
        (("--mesh", "model=1", "serve"), "the axes are data, fsdp and tensor"),
        (("--pictures", "100", "--price", "nan"), "--price must be positive"),
        (("--batch", "16,32"), "several numbers only for a --search"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_before_compiling(options, words, compiled, capsys):
    assert run(*options) == 1
    assert words in capsys.readouterr().err
    assert not compiled


@pytest.mark.parametrize("option", ["--json", "--save"])
def test_a_folder_is_no_file_to_write(option, compiled, capsys, tmp_path):
    assert run(option, str(tmp_path)) == 1
    assert "cannot be written" in capsys.readouterr().err
    assert not compiled
