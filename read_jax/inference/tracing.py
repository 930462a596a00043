"""Every stage of a forward pass, for people who study the model and for parity with the original.

Arrays (float32 on the host; n = 1 conversation, L tokens, E = L + N - 1 positions after the image
placeholder became N image tokens, m [SEG] tokens, P points):

    input_ids, attention_mask            (n, L)          tokens, -200 for the image placeholder
    expanded_attention_mask              (n, E)
    original_hw, sam_input_hw            (2,)            pixels
    clip_pixel_values                    (3, 336, 336)   standardised CLIP input
    sam_input                            (3, 1024, 1024) standardised SAM input, zero-padded
    clip_features                        (N, Dc)         selected hidden state of CLIP
    projector_output                     (N, D)          image tokens as the language model sees them
    last_hidden                          (n, E, D)       states after the final norm
    logits                               (n, E, V)
    logits_last8, logits_last8_index     (n, 8, V), (n, 8)  the same at the last 8 positions
    seg_row, seg_expanded_index          (m,)            position of the state that predicts each [SEG]
    pred_embedding                       (m, C)          that state projected to SAM's prompt width
    similarity                           (m, N)          its dot product with every image token's state
    points_discrete, points_labels       (m, P, 2), (m, P)  chosen pixels (original frame), 1 / 0 / -1
    points_continuous                    (m, P, 2)       original frame
    point_coords_1024                    (m, P, 2)       SAM-1024 frame
    sasp_grid_hw, sasp_image_hw          (m, 2)          padded grid, image size
    sparse_embeddings                    (m, tokens, C)  points, padding point, text
    dense_embedding_vector               (C,)            the dense prompt, constant over the grid
    image_embedding                      (C, g, g)       SAM's
    low_res_masks                        (m, 4g, 4g)
    iou_pred                             (m, 1)
    mask_logits, mask                    (m, h, w)       original size
    prompt_ids, output_ids               (l,), (k,)      the open prompt, and prompt plus answer
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from read_jax.geometry import sasp_geometry
from read_jax.inference.programs import bucket
from read_jax.inference.request import split_prompt
from read_jax.models.clip import normalize_clip
from read_jax.models.sam.image_encoder import normalize_sam
from read_jax.text.conversation import check_question, get_template, open_prompt, render
from read_jax.text.tokenizer import IMAGE_TOKEN

if TYPE_CHECKING:
    from read_jax.inference.segmenter import Segmenter


def trace_answer(
    segmenter: Segmenter, image: Any, prompt: str, answer: str | None, conversation: str
) -> dict[str, np.ndarray]:
    """The arrays listed above for one question; generates the answer when it is None."""
    config, tokenizer, programs = segmenter.config, segmenter.tokenizer, segmenter.programs
    template = get_template(conversation)
    check_question(prompt, tokenizer)
    prompt_ids = tokenizer.encode(open_prompt(prompt, template, config.use_im_start_end))
    if answer is None:
        generated = segmenter.segment(image, prompt, conversation)
        ids = prompt_ids + generated.output_ids.tolist()
    else:
        question = f"{IMAGE_TOKEN}\n{prompt}"
        ids = tokenizer.encode(render([(question, answer)], template, config.use_im_start_end))

    picture = segmenter.prepare_image(image)
    cut = split_prompt(ids, config, room=0)
    features, prefix = segmenter.encode([picture], cut)
    own = np.zeros((1, 1, bucket(len(cut.question), 32)), np.int32)
    own[0, 0, : len(cut.question)] = cut.question
    states = programs.teacher_force(prefix, own)
    logits = programs.logits(jnp.concatenate([prefix.states[0], states[0, 0]]))

    length = len(cut.prefix) + len(cut.question)
    hidden = np.concatenate([_host(prefix.states[0]), _host(states[0, 0])])[:length]
    logits = _host(logits)[:length]
    # the state before each [SEG] predicts it; a prompt has none, so all lie after the prefix
    seg = np.flatnonzero(cut.question == segmenter.seg_id) - 1
    last8 = np.arange(max(length - 8, 0), length)
    geometry = picture.geometry
    raw = np.asarray(ids, np.int32)
    out = {
        "input_ids": raw[None],
        "attention_mask": (raw != tokenizer.pad_id)[None],
        "expanded_attention_mask": np.concatenate([cut.prefix, cut.question])[None] != tokenizer.pad_id,
        "original_hw": np.asarray([geometry.height, geometry.width]),
        "sam_input_hw": np.asarray([geometry.sam_height, geometry.sam_width]),
        "clip_pixel_values": _channels_first(normalize_clip(jnp.asarray(picture.clip_pixels)[None])[0]),
        "sam_input": _channels_first(
            normalize_sam(
                jnp.asarray(picture.sam_pixels)[None], geometry.sam_height[None], geometry.sam_width[None]
            )[0]
        ),
        "clip_features": _host(features.clip_features[0]),
        "projector_output": _host(features.image_tokens[0]),
        "last_hidden": hidden[None],
        "logits": logits[None],
        "logits_last8": logits[last8][None],
        "logits_last8_index": last8[None],
        "image_embedding": _channels_first(features.image_embedding[0]),
        "seg_row": np.zeros(len(seg), np.int64),
        "seg_expanded_index": len(cut.prefix) + seg,
        "prompt_ids": np.asarray(prompt_ids, np.int32),
        "output_ids": raw,
    }
    return out | _mask_stages(segmenter, picture, cut, features, prefix, states, seg)


def _mask_stages(
    segmenter: Segmenter, picture: Any, cut: Any, features: Any, prefix: Any, states: Any, seg: np.ndarray
) -> dict[str, np.ndarray]:
    """The stages from the [SEG] states to the masks; leading dimension 0 when there is no [SEG]."""
    geometry, config = picture.geometry, segmenter.config
    at = np.stack([np.zeros_like(seg), np.zeros_like(seg), seg], axis=-1)
    predicted = segmenter.predict(states, at, [picture], features, prefix, cut.image_start)
    low_res = predicted.low_res_masks[: len(seg)]
    height, width = int(geometry.height), int(geometry.width)
    mask_logits = np.zeros((len(seg), height, width), np.float32)
    for row in range(len(seg)):
        mask_logits[row] = segmenter.programs.mask(low_res[row], geometry)
    grid = sasp_geometry(height, width, config.sasp, config.clip.grid_size)

    def rows(x: Any) -> np.ndarray:
        return _host(x)[: len(seg)]

    return {
        "pred_embedding": rows(predicted.pred_embedding),
        "similarity": rows(predicted.similarity),
        "points_discrete": rows(predicted.points.discrete),
        "points_labels": rows(predicted.points.labels),
        "points_continuous": rows(predicted.points.points),
        "point_coords_1024": rows(predicted.point_coords),
        "sasp_grid_hw": np.tile([grid.grid_height, grid.grid_width], (len(seg), 1)),
        "sasp_image_hw": np.tile([height, width], (len(seg), 1)),
        "sparse_embeddings": rows(predicted.sparse_embeddings),
        "dense_embedding_vector": _host(predicted.dense_embedding),
        "low_res_masks": rows(predicted.low_res_masks),
        "iou_pred": rows(predicted.iou)[:, None],
        "mask_logits": mask_logits,
        "mask": mask_logits > 0,
    }


def _host(x: Any) -> np.ndarray:
    """On the host; floating point (bfloat16 too) as float32, integers as they are."""
    x = np.asarray(x)
    return x if np.issubdtype(x.dtype, np.integer) else x.astype(np.float32)


def _channels_first(x: Any) -> np.ndarray:
    return np.moveaxis(_host(x), -1, 0)
