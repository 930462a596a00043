"""Scores of the current parameters on a fixed set: right answers given, the masks of their [SEG] scored."""

from __future__ import annotations

import contextlib
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
from read_jax.data.loader import HostBatch
from read_jax.data.packing import Batch, Packer
from read_jax.data.pipeline import MAX_BAD_SHARE, EvaluationLoader
from read_jax.errors import ReadJaxError
from read_jax.evaluation.metrics import MaskCounts, SegmentationMetrics
from read_jax.images.drawing import draw_comparison, draw_similarity
from read_jax.processes import batch_shares, from_shares, is_first, together
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

Array = Any  # on devices, or on the host


class Marks(NamedTuple):
    """What is known of a batch's B rows beside its arrays.

    drawn: int32 [B], 1 + the number in the source of a picture to draw, 0 for others. unusable: int32 [B],
    pictures that could not be used, each process's in the first of its rows.
    """

    drawn: Array
    unusable: Array


class Shown(NamedTuple):
    """What is drawn of a batch: D answers, each the first of its picture that has a mask.

    drawn: int32 [D], as in `Marks`; scored: bool [D], whether there is such an answer; masks: bool, and
    targets: uint8 [D, Hm, Wm], on the canvas; mask_size: [D, 2], as in `Batch`; points: [D, P, 2], in
    original pixels; labels: [D, P]; similarity: [D, N].
    """

    drawn: Array
    scored: Array
    masks: Array
    targets: Array
    mask_size: Array
    points: Array
    labels: Array
    similarity: Array


class Scored(NamedTuple):
    """What is said of a batch, the same in every process.

    counts: int32 [B, Q] each, as in `MaskCounts`; scored: bool [B, Q], which of them count; ce: the loss of
    the texts; tokens, answers: how many that is a mean over, and how many texts there are; begun: answers
    whose first token is the model's own choice; unusable: pictures; shown: what is drawn.
    """

    counts: tuple[Array, ...]
    scored: Array
    ce: Array
    tokens: Array
    answers: Array
    begun: Array
    unusable: Array
    shown: Shown


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
    """Scores a source again and again. Every process prepares its share of each batch.

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
        self._drawn: dict[str, int] = {}  # key: number in the source
        for i in range(min(pictures, len(self._source))):
            with contextlib.suppress(ReadJaxError):  # it is told of when its turn comes
                self._drawn[f"{source.name}:{source[i].key}"] = i
        share = batch_shares(sharding)[jax.process_index()]
        # too many unusable ones are found out here, over all shares
        self._loader = EvaluationLoader(
            self._source, packer, batch, host_index=share.index, host_count=share.count, max_bad_share=1
        )
        self._start, self._max_bad_share = self._loader.state(), max_bad_share
        prefix_ids, image_start, drawn = packer.prefix_ids, packer.image_start, len(self._drawn)

        def score(params: Any, frozen: Any, batch: Batch, marks: Marks) -> Scored:
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
            of, scored = count(batch), batch.has_mask & batch.valid[:, None]
            ce = text_loss(model, out.states, batch, of, Turns(abreast, recompute=False))
            counts, *answers = map_pictures(of_picture, parts, abreast)
            rows = jnp.argsort(marks.drawn == 0, stable=True)[:drawn]  # those to draw come first
            first = jnp.argmax(scored[rows], axis=1)
            masks, points, labels, similarity = (x[rows, first] for x in answers)
            shown = Shown(
                marks.drawn[rows],
                scored[rows, first],
                masks,
                batch.masks[rows, first],
                batch.mask_size[rows],
                points,
                labels,
                similarity,
            )
            unusable = jnp.sum(marks.unusable)
            return Scored(counts, scored, ce, of.tokens, of.answers, jnp.sum(begun), unusable, shown)

        self._score = together(
            jax.jit(on_mesh(score, sharding.mesh), out_shardings=replicated(sharding.mesh))
        )

    def __call__(
        self, params: Any, frozen: Any, stop: Callable[[], bool] = lambda: False
    ) -> tuple[dict[str, float], list[Picture]] | None:
        """(scores, pictures), or None when `stop`, which is asked before every batch, said so.

        Scores are gIoU and cIoU, the loss of the answers' texts ("ce"), the share of answers that the model
        would begin as given, so whether it affirms or denies ("first_token_accuracy"), and how many masks
        were scored ("masks"); where pictures could not be used, also how many ("unusable").

        Pictures are drawn by the first process alone.

        Raises `DataError`, in every process, when the unusable ones are too many.
        """
        metrics = SegmentationMetrics()
        texts, tokens, begun, answers, unusable, pictures = 0.0, 0, 0, 0, 0, []
        self._loader.restore(self._start)
        hidden = None if is_first() else True  # None: shown on a terminal
        bar = tqdm(
            self._loader, "validating", len(self._loader), leave=False, file=sys.stderr, disable=hidden
        )
        for host in bar:
            if stop():
                bar.close()
                self._loader.close()
                return None
            batch = from_shares(self._sharding, (host.arrays, self._marks(host)))
            scored: Scored = jax.tree.map(np.asarray, self._score(params, frozen, *batch))
            unusable += int(scored.unusable)
            if unusable > self._max_bad_share * self._loader.places:
                bar.close()
                self._loader.close()
                raise self._loader.too_many(unusable, self._loader.places, self._max_bad_share)
            for row in np.flatnonzero(scored.scored.any(axis=1)):
                metrics.update_counts(MaskCounts(*(x[row][scored.scored[row]] for x in scored.counts)))
            begun, answers = begun + int(scored.begun), answers + int(scored.answers)
            texts, tokens = texts + float(scored.ce) * int(scored.tokens), tokens + int(scored.tokens)
            if is_first():
                for row in np.flatnonzero((scored.shown.drawn > 0) & scored.shown.scored):
                    pictures.append(self._draw(Shown(*(x[row] for x in scored.shown))))
        result = metrics.result()
        scores = {name: float(result[name]) for name in ("giou", "ciou") if result[name] is not None}
        scores |= {"ce": texts / max(tokens, 1), "first_token_accuracy": begun / max(answers, 1)}
        if unusable:
            scores["unusable"] = float(unusable)
        return scores | {"masks": result["masks"]}, pictures

    def close(self) -> None:
        """Stop what prepares batches."""
        self._loader.close()

    def _marks(self, host: HostBatch) -> Marks:
        """Of a share's rows."""
        drawn, unusable = (np.zeros(len(host.keys), np.int32) for _ in range(2))
        for row, key in enumerate(host.keys):
            name, _, first = key.rpartition("#")
            if first == "0" and name in self._drawn:
                drawn[row] = 1 + self._drawn[name]
        unusable[0] = len(host.skipped)
        return Marks(drawn, unusable)

    def _draw(self, shown: Shown) -> Picture:
        """Answer and target over the picture; beside it, where points were enabled, map and points."""
        number = int(shown.drawn) - 1
        image = self._source[number].load_image()
        height, width = (int(n) for n in shown.mask_size)
        scale = np.array([width / image.shape[1], height / image.shape[0]], np.float32)
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
        mask, target = shown.masks[:height, :width], shown.targets[:height, :width]
        panels = [draw_comparison(image, mask, target)]
        if self._packer.config.sasp.enabled:
            points = shown.points * scale
            panels.append(draw_similarity(image, shown.similarity, points, shown.labels))
        key = f"{self._source.name}:{self._source[number].key}"
        name = "".join(c if c.isalnum() or c in "-_." else "_" for c in key)
        return Picture(name, np.concatenate(panels, axis=1))


def save_pictures(folder: Path, pictures: list[Picture]) -> None:
    """Write them as FOLDER/NAME.png."""
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        Image.fromarray(picture.pixels).save(folder / f"{picture.name}.png")
