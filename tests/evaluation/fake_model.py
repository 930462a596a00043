"""A dataset and a model that need no files and answer at once, and their evaluation.

python -m tests.evaluation.fake_model OUTPUT PICTURES SECONDS    evaluates, taking so long for a batch
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from types import SimpleNamespace
from unittest import mock

import numpy as np

from read_jax.data.item import Item, Query
from read_jax.errors import ImageError, PromptError
from read_jax.evaluation import runner
from read_jax.images.masks import CompactMask

SIDE = 12


class Interrupted(Exception):
    """Stands for whatever ends a process early."""


@dataclasses.dataclass
class FakeSource:
    """Pictures of one colour that tells their number, 1 to 3 questions each, the last one about nothing."""

    pictures: int
    compat: str | None = None
    name: str = "R-refcoco|val"
    broken: tuple[int, ...] = ()
    sizes_differ: tuple[int, ...] = ()
    endless: tuple[int, ...] = ()

    def __len__(self):
        return self.pictures

    def __getitem__(self, index):
        count = 1 + index % 3
        queries = tuple(
            Query(
                f"{'Endless' if index in self.endless else 'Thing'} {index}.{i}",
                exists=i < 2,
                is_sentence=i == 1,
                ref_id=index,
                sent_id=i,
                tags=("referring", "near") if i == 0 else (),
            )
            for i in range(count)
        )
        width = SIDE + (index in self.sizes_differ)

        def load_image():
            if index in self.broken:
                raise ImageError(f"{index}.jpg is torn")
            return np.full((SIDE, width, 3), index, np.uint8)

        def load_mask(i):
            mask = np.zeros((SIDE, SIDE), np.uint8)
            mask[: index % 5 + 1, : i + 3] = 1
            mask[-1] = 255
            return CompactMask.encode(mask)

        return Item(f"p/{index}", SIDE, SIDE, f"{index}.jpg", queries, load_image, load_mask)


class FakeSegmenter:
    """Two masks that follow from the picture, the question, and how pictures are put together in a batch."""

    def __init__(self, stop_after=None, seconds=0.0):
        self.images_per_batch = self.rows_per_batch = 1
        self.calls = []
        self.stop_after = stop_after
        self.seconds = seconds

    def prepare_prompt(self, prompt, conversation):
        if "endless" in prompt:
            raise PromptError("too long")

    def prepare_answer(self, prompt, answer, conversation):
        self.prepare_prompt(prompt, conversation)

    def prepare_image(self, pixels):
        return int(pixels[0, 0, 0])

    def segment_batch(self, requests, conversation, max_new_tokens):
        return self._answers("generate", conversation, [(image, q, None) for image, q in requests])

    def segment_forced(self, requests, conversation):
        return self._answers("forced", conversation, requests)

    def _answers(self, mode, conversation, requests):
        if self.stop_after is not None and len(self.calls) >= self.stop_after:
            raise Interrupted
        self.calls.append((mode, conversation, requests))
        time.sleep(self.seconds)
        batch = sorted({image for image, _, _ in requests})
        return [self._answer(image, question, answer, batch) for image, question, answer in requests]

    def _answer(self, image, question, answer, batch):
        rng = np.random.default_rng([image, *question.encode(), *batch])
        count = 2 if answer is None or "[SEG]" in answer else 0
        masks = rng.random((count, SIDE, SIDE)) < 0.4
        if ".0" in question and image % 4 == 0:
            masks[:] = False
        return SimpleNamespace(masks=masks, iou=np.full(count, image / 10), text=answer or "It is [SEG].")


def evaluate(source, segmenter, output, dataset=None, **options):
    """`runner.evaluate` of a fake model, or of several copies, on a fake source."""
    copies = segmenter if isinstance(segmenter, list) else [segmenter]
    record = SimpleNamespace(fingerprint="f00", dtype="float32")
    fakes = {"load_source": source, "load_record": record, "load_copies": copies, "device_groups": copies}
    with contextlib.ExitStack() as stack:
        for name, value in fakes.items():
            stack.enter_context(mock.patch.object(runner, name, return_value=value))
        return runner.evaluate("model", dataset or source.name, None, output, **options)


if __name__ == "__main__":
    output, pictures, seconds = sys.argv[1:]
    evaluate(FakeSource(int(pictures)), FakeSegmenter(seconds=float(seconds)), output)
