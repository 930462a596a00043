"""Scores of the current parameters on a fixed set: right answers given, the masks of their [SEG] scored."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from PIL import Image
from tqdm import tqdm

from read_jax.data.item import Compat, Item, Source
from read_jax.data.packing import Batch, Packer
from read_jax.data.pipeline import MAX_BAD_SHARE, EvaluationLoader
from read_jax.evaluation.metrics import MaskCounts, SegmentationMetrics
from read_jax.images.drawing import draw_comparison, draw_similarity
from read_jax.processes import from_equals, is_first, several, together
from read_jax.sharding import on_mesh, replicated
from read_jax.training.objective import (
    Turns,
    count,
    first_tokens,
    forward,
    map_pictures,
    picture_masks,
    targets_of,
    text_loss,
)

Array = jax.Array


class Scored(NamedTuple):
    """A batch's answers.

    counts: int32 [B, Q] each, as in `MaskCounts`; masks: bool [B, Q, Hm, Wm], on the canvas; points:
    [B, Q, P, 2], in original pixels; labels: [B, Q, P]; similarity: [B, Q, N]; ce: the loss of the texts;
    begun: int32 [B], answers whose first token is the model's own choice.
    """

    counts: tuple[Array, ...]
    masks: Array
    points: Array
    labels: Array
    similarity: Array
    ce: Array
    begun: Array


@dataclasses.dataclass(frozen=True)
class Picture:
    """A drawn answer: uint8 [h, w, 3]."""

    name: str
    pixels: np.ndarray


class _First:
    """The first items of a source."""

    def __init__(self, source: Source, length: int) -> None:
        self.name: str = source.name
        self.compat: Compat = source.compat
        self._source, self._length = source, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Item:
        return self._source[index]


class Validator:
    """Scores a source again and again.

    Questions without a [SEG] in their answer are not scored. Masks are compared on the canvas of the batches:
    at the dataset's own size unless a picture is larger than the canvas.

    Args:
        source: what to score; limit: only its first pictures, 0 for all.
        packer: of the training, whose shapes it uses.
        graphdef: of the model, as `split_model` gives it.
        batch: pictures at a time, a multiple of abreast.
        sharding: of the batches, on the mesh of the parameters.
        abreast: devices that share a batch.
        pictures: so many of the first pictures are drawn.
        max_bad_share: as for every loader.
    """

    def __init__(
        self,
        source: Source,
        packer: Packer,
        graphdef: Any,
        *,
        batch: int,
        sharding: NamedSharding,
        abreast: int = 1,
        limit: int = 0,
        pictures: int = 0,
        max_bad_share: float = MAX_BAD_SHARE,
    ) -> None:
        self._source = _First(source, min(limit or len(source), len(source)))
        self._packer, self._sharding = packer, sharding
        self._loader = EvaluationLoader(self._source, packer, batch, max_bad_share=max_bad_share)
        self._start = self._loader.state()
        self._drawn = {f"{source.name}:{source[i].key}#0": i for i in range(min(pictures, len(self._source)))}
        prefix_ids, image_start = packer.prefix_ids, packer.image_start

        def score(params: Any, frozen: Any, batch: Batch) -> Scored:
            model = nnx.merge(graphdef, params, frozen, copy=True)
            out = forward(model, batch, prefix_ids, image_start)
            masks_of, parts = picture_masks(model, out, batch, image_start)

            def of_picture(args: Any) -> Any:
                masks, target = masks_of(args), args[-1] == 1
                found = masks.logits > 0
                wanted, given = target & masks.valid, found & masks.valid
                sums = [
                    jnp.sum(x, axis=(-2, -1), dtype=jnp.int32)
                    for x in (wanted & given, wanted | given, wanted, given, masks.valid)
                ]
                points = masks.prediction.points
                return tuple(sums), found, points.points, points.labels, masks.prediction.similarity

            def begun_rightly(args: tuple[Array, Array]) -> Array:
                choice = jnp.argmax(model.llama.logits(args[0]), axis=-1)
                return jnp.sum(choice == args[1], dtype=jnp.int32)  # IGNORE_INDEX is no token

            states, targets = out.states[:, :, :-1], first_tokens(targets_of(batch))
            begun = map_pictures(begun_rightly, (states, targets), abreast)
            ce = text_loss(model, out.states, batch, count(batch), Turns(abreast, recompute=False))
            counts, masks, points, labels, similarity = map_pictures(of_picture, parts, abreast)
            return Scored(counts, masks, points, labels, similarity, ce, begun)

        # every process makes the whole of the batch, and gets the whole of the answer
        whole = replicated(sharding.mesh) if several() else None
        self._score = together(jax.jit(on_mesh(score, sharding.mesh), out_shardings=whole))

    def __call__(
        self, params: Any, frozen: Any, stop: Callable[[], bool] = lambda: False
    ) -> tuple[dict[str, float], list[Picture]] | None:
        """(scores, pictures), or None when `stop`, which is asked before every batch, said so.

        Scores are gIoU and cIoU, the loss of the answers' texts ("ce"), the share of answers that the model
        would begin as given, so whether it affirms or denies ("first_token_accuracy"), and how many masks
        were scored ("masks"); where pictures could not be used, also how many ("unusable").

        Raises `DataError` when these are too many.
        """
        metrics = SegmentationMetrics()
        texts, tokens, begun, answers, pictures = 0.0, 0, 0, 0, []
        self._loader.restore(self._start)
        shown = None if is_first() else True  # on a terminal
        bar = tqdm(self._loader, "validating", len(self._loader), leave=False, file=sys.stderr, disable=shown)
        for host in bar:
            if stop():
                bar.close()
                self._loader.close()
                return None
            arrays = host.arrays
            scored = self._score(params, frozen, from_equals(self._sharding, arrays))
            kept = arrays.has_mask & arrays.valid[:, None]
            numbers = MaskCounts(*(np.asarray(x) for x in scored.counts))
            for b in np.flatnonzero(kept.any(axis=1)):
                metrics.update_counts(MaskCounts(*(x[b][kept[b]] for x in numbers)))
            counts = count(arrays)
            supervised = int(counts.tokens)
            begun, answers = begun + int(np.sum(scored.begun)), answers + int(counts.answers)
            texts, tokens = texts + float(scored.ce) * supervised, tokens + supervised
            for b, key in enumerate(host.keys):
                if key in self._drawn and kept[b].any():
                    pictures.append(self._draw(key, b, int(np.argmax(kept[b])), arrays, scored))
        result = metrics.result()
        scores = {name: float(result[name]) for name in ("giou", "ciou") if result[name] is not None}
        scores |= {"ce": texts / max(tokens, 1), "first_token_accuracy": begun / max(answers, 1)}
        if self._loader.skipped_count:
            scores["unusable"] = float(self._loader.skipped_count)
        return scores | {"masks": result["masks"]}, pictures

    def close(self) -> None:
        """Stop what prepares batches."""
        self._loader.close()

    def _draw(self, key: str, b: int, q: int, arrays: Batch, scored: Scored) -> Picture:
        """Answer and target over the picture; beside it, where points were enabled, map and points."""
        image = self._source[self._drawn[key]].load_image()
        height, width = (int(n) for n in arrays.mask_size[b])
        scale = np.array([width / image.shape[1], height / image.shape[0]], np.float32)
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
        mask = np.asarray(scored.masks[b, q])[:height, :width]
        panels = [draw_comparison(image, mask, arrays.masks[b, q, :height, :width])]
        if self._packer.config.sasp.enabled:
            points = np.asarray(scored.points[b, q]) * scale
            labels, similarity = np.asarray(scored.labels[b, q]), np.asarray(scored.similarity[b, q])
            panels.append(draw_similarity(image, similarity, points, labels))
        name = "".join(c if c.isalnum() or c in "-_." else "_" for c in key.removesuffix("#0"))
        return Picture(name, np.concatenate(panels, axis=1))


def save_pictures(folder: Path, pictures: list[Picture]) -> None:
    """Write them as FOLDER/NAME.png."""
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        Image.fromarray(picture.pixels).save(folder / f"{picture.name}.png")
