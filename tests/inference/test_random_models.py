"""Whole models of other architectures than the published ones, against their parts in PyTorch.

Each case draws an architecture and weights from its seed, fixes what it is about, writes a checkpoint in
the original layout, and holds every stage of the converted model against `torch_reference`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import read_jax
from read_jax.config import SaspConfig
from read_jax.weights import convert
from tests.inference.torch_reference import TorchRead
from tests.models.parameters import assert_close
from tests.models.sasp_reference import normalised_grid, padded, padding, thresholds
from tests.weights.synthetic import Sizes, moderate, write_clip, write_read_checkpoint

pytestmark = pytest.mark.usefixtures("compiled_quickly")
QUESTION, ANSWER = "where is the red fox in the picture?", "sure, it is [SEG] beside the house."
TWO_MASKS = "sure, it is [SEG] beside [SEG]."
NEW_TOKENS = 8
LEAD = 1e-3  # of a logit over the next; they are around 1
MARGIN = 1e-5  # of a normalised similarity map, in which rounding makes less than 1e-6
CLOSE = (
    "clip_pixel_values", "sam_input", "clip_features", "projector_output", "image_embedding", "last_hidden",
    "logits", "pred_embedding", "similarity", "sparse_embeddings", "low_res_masks", "iou_pred", "mask_logits",
)  # fmt: skip
EQUAL = ("input_ids", "original_hw", "sam_input_hw", "seg_expanded_index")
EQUAL_POINTS = ("points_discrete", "points_labels", "sasp_grid_hw")
CLOSE_POINTS = ("points_continuous", "point_coords_1024")


@dataclasses.dataclass(frozen=True)
class Case:
    """What is fixed of an architecture drawn from `seed`, and the pictures (height, width, seed) to try."""

    name: str
    seed: int
    pictures: tuple[tuple[int, int, int], ...]
    kind: str = "read"
    preset: str = "7b"
    continuous: bool = True
    clip_side: int = 336
    conversation: str = "llava_v1"
    answer: str = ANSWER
    sizes: dict[str, Any] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


# one architecture for both ablations of the points: what is compiled for one serves the other
ABLATION: dict[str, Any] = {"seed": 4, "options": {"mm_projector_type": "mlp3x_gelu"}, "answer": TWO_MASKS}
CASES = [
    Case(
        "13b-points-grouped-query-tied",
        seed=3,
        pictures=((321, 430, 1), (60, 47, 0)),
        preset="13b",
        sizes={"heads": 6, "kv_heads": 2},
        options={"tie_word_embeddings": True},
    ),
    Case(
        "lisa-linear-projector-last-clip-layer",
        seed=3,
        pictures=((450, 376, 0), (37, 53, 1)),
        kind="lisa",
        preset="off",
        clip_side=224,
        conversation="llava_llama_2",
        options={"mm_vision_select_layer": -1},
    ),
    Case("discrete-points", pictures=((376, 376, 0), (500, 333, 21)), continuous=False, **ABLATION),
    Case("points-of-the-paper", pictures=((355, 640, 4), (53, 37, 10)), preset="paper", **ABLATION),
]


def draw_sizes(case: Case) -> tuple[Sizes, dict[str, Any], dict[str, Any]]:
    """Sizes, changes of the checkpoint's config and changes of CLIP's config."""
    rng = np.random.default_rng(case.seed)

    def one_of(*values: Any) -> Any:
        return values[rng.integers(len(values))]

    depth = one_of(2, 3)
    heads, clip_heads, sam_heads = one_of(2, 3, 4), one_of(1, 2, 3), one_of(1, 2)
    sam_dim = 16 * sam_heads
    sizes = {
        "hidden": one_of(24, 36, 48),
        "layers": one_of(2, 3),
        "heads": heads,
        "kv_heads": one_of(1, heads),
        "head_dim": one_of(6, 8, 12),
        "inter": one_of(20, 40),
        "clip_hidden": 8 * clip_heads,
        "clip_heads": clip_heads,
        "clip_layers": one_of(2, 3, 4),
        "clip_inter": one_of(12, 20),
        "sam_dim": sam_dim,
        "sam_heads": sam_heads,
        "sam_depth": depth,
        "sam_global": (int(rng.integers(depth)),),
        "sam_grid": 64,
        "sam_window": one_of(8, 10, 14),
        "sam_mlp": one_of(1, 2, 3) * sam_dim,
        "sam_out": one_of(32, 48),
        "decoder_mlp": one_of(24, 40),
    }
    options = {
        "rope_theta": one_of(200.0, 5000.0, 1e6),
        "rms_norm_eps": one_of(1e-6, 1e-3, 1e-2),
        "mm_vision_select_layer": one_of(-2, 1),
    }
    clip_options = {"hidden_act": one_of("quick_gelu", "gelu"), "layer_norm_eps": one_of(1e-5, 1e-3)}
    return Sizes(**sizes | case.sizes), options | case.options, clip_options


def picture(height: int, width: int, seed: int) -> np.ndarray:
    """Random patches of colour with some noise, uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    rows, columns = np.arange(height) * 9 // height, np.arange(width) * 9 // width
    patches = rng.integers(0, 256, (9, 9, 3))[rows][:, columns]
    return np.clip(patches + rng.integers(-20, 21, patches.shape), 0, 255).astype(np.uint8)


def rounding_margin(similarity: np.ndarray, height: int, width: int, config: SaspConfig) -> float:
    """How far the chosen points are from being others, in units of the normalised map.

    The smallest gap between values whose order matters, or between a value and a threshold that matters.
    """
    side = round(similarity.size**0.5)
    square = normalised_grid(torch.from_numpy(similarity).double().reshape(side, side), config)
    high, low = thresholds(square.numpy(), config)
    grid = padded(square, padding(height, width, len(square)), -1.0).numpy()
    values = grid[grid >= 0]
    positive = np.sort(values[values >= high])[::-1][: config.num_points + 1]
    gaps = [np.abs(np.diff(positive))]
    if len(positive) <= config.num_points:  # negatives are reached
        negative = np.sort(values[values <= low])[: config.num_points + 1 - len(positive)]
        gaps += [np.diff(negative), np.abs(values - high), np.abs(values - low)]
    return float(np.concatenate(gaps).min())


@dataclasses.dataclass(frozen=True)
class Models:
    """A case's model, ours and theirs."""

    case: Case
    ours: read_jax.Segmenter
    theirs: TorchRead


@pytest.fixture(scope="module", params=CASES, ids=[case.name for case in CASES])
def models(request, tmp_path_factory) -> Models:
    case: Case = request.param
    folder: Path = tmp_path_factory.mktemp(case.name)
    sizes, options, clip_options = draw_sizes(case)
    checkpoint = write_read_checkpoint(
        folder / "checkpoint",
        kind=case.kind,
        format="safetensors",
        sizes=sizes,
        buffers=False,
        seed=case.seed,
        options=options,
        scale=moderate,
    )
    clip = write_clip(
        folder / "clip",
        image_size=case.clip_side,
        sizes=sizes,
        seed=case.seed + 100,
        options=clip_options,
        scale=moderate,
    )
    convert(checkpoint, clip, folder / "model", sasp=case.preset)
    if not case.continuous:
        file = folder / "model" / "config.json"
        record = json.loads(file.read_text())
        record["config"]["sasp"]["continuous"] = False
        file.write_text(json.dumps(record))
    sasp = SaspConfig.preset(case.preset, continuous=case.continuous)
    return Models(case, read_jax.load(folder / "model"), TorchRead(checkpoint, clip, sizes, sasp))


def test_every_stage_equals_the_composition_of_the_torch_parts(models):
    case, sasp = models.case, models.theirs.sasp
    for height, width, seed in case.pictures:
        image = picture(height, width, seed)
        ours = models.ours.trace(image, QUESTION, case.answer, case.conversation)
        theirs = models.theirs.trace(image, QUESTION, case.answer, case.conversation)
        if sasp.enabled:
            margin = min(rounding_margin(s, height, width, sasp) for s in theirs["similarity"])
            assert margin > MARGIN, f"choose another picture: points hang on a difference of {margin:.2g}"

        for name in EQUAL + EQUAL_POINTS * sasp.enabled:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=f"{name} at {height}x{width}")
        for name in CLOSE + CLOSE_POINTS * sasp.enabled:
            assert_close(ours[name], theirs[name])
        np.testing.assert_array_equal(ours["mask"], ours["mask_logits"] > 0)
        # random weights give nearly all or nothing at 0, so also at the level that takes half the picture
        for a, b in zip(ours["mask_logits"], theirs["mask_logits"], strict=True):
            middle = np.sort(b, axis=None)[b.size // 2 - 1 : b.size // 2 + 1].mean()  # between two pixels
            for level in (0.0, middle):
                both, either = (a > level) & (b > level), (a > level) | (b > level)
                assert both.sum() >= 0.999 * either.sum()


@pytest.mark.parametrize("models", CASES[:3], ids=[case.name for case in CASES[:3]], indirect=True)
def test_generation_equals_greedy_decoding_that_recomputes_everything(models):
    case = models.case
    image = picture(*case.pictures[0])
    expected, lead = models.theirs.generate(image, QUESTION, case.conversation, NEW_TOKENS)
    assert lead > LEAD, f"choose another picture: a token leads by {lead:.2g}"
    assert len(set(expected)) > 1, "choose another seed: a single token says little about positions"
    result = models.ours.segment(image, QUESTION, case.conversation, NEW_TOKENS)
    np.testing.assert_array_equal(result.output_ids, expected)
