"""Asking a model the questions of a source's pictures, and scoring what it answers.

Threads decode and resize the coming pictures, and score those answered, while the device works.
"""

from __future__ import annotations

import math
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import numpy as np

from read_jax.data.item import Compat, Item, Query, Source
from read_jax.errors import ImageError, ReadJaxError
from read_jax.evaluation.journal import Journal
from read_jax.evaluation.metrics import counts
from read_jax.images.masks import mask_to_rle
from read_jax.inference.segmenter import PreparedImage, Segmentation, Segmenter

Mode = Literal["forced", "generate"]
Progress = Callable[[int, int, str], None]
"""Called with the pictures done and to do, and in words how many questions were answered."""


_AHEAD = 2  # windows that are prepared ahead, with one copy of the model


class Settings(NamedTuple):
    """What the answers to a dataset's questions depend on beside the model."""

    mode: Mode
    compat: Compat
    conversation: str
    max_new_tokens: int | None
    """None in forced mode."""
    notes: tuple[str, ...] = ()
    """Choices that were made for the user."""


def answer(
    segmenters: Sequence[Segmenter],
    source: Source,
    settings: Settings,
    windows: Iterable[Sequence[int]],
    journal: Journal,
    *,
    check: Callable[[Iterable[Mapping[str, Any]]], None] = lambda records: None,
    progress: Progress | None = None,
) -> None:
    """Ask the questions of the pictures in `windows` that the journal misses, and write the answers into it.

    Copies of the model have a window each at a time; answers are written in the order of the windows. One
    with a missing picture goes through the model as a whole: another batch would differ in the last bits.
    `check` is called with the new records whenever one is a failure, and may raise.
    """
    windows = list(windows)
    total = sum(map(len, windows))
    todo = {index for window in windows for index in missing(window, journal)}
    asked = 0
    new: list[dict[str, Any]] = []
    if progress:
        progress(total - len(todo), total, "")
    pool = ThreadPoolExecutor(max_workers=min(8 * len(segmenters), os.cpu_count() or 1))
    lock = threading.Lock()

    def prepare(index: int) -> _Ready | dict[str, Any]:
        return _prepare(index, source, segmenters[0], settings, lock)

    def write(scored: list[Future[dict[str, Any]]]) -> None:
        nonlocal asked
        records = [future.result() for future in scored]
        for record in records:
            todo.discard(record["index"])
            journal.append(record)
            asked += len(record.get("questions", ()))
            if progress:
                progress(total - len(todo), total, f"{asked} questions")
        new.extend(records)
        if any("error" in record for record in records):
            check(new)

    try:
        waiting: list[Future[dict[str, Any]]] = []
        coming = [window for window in windows if not todo.isdisjoint(window)]
        prepared = _ahead(pool, prepare, coming, _AHEAD + len(segmenters) - 1)
        for window, found in _asked(segmenters, settings, prepared):
            results, scored = iter(found), []
            for picture in window:
                if isinstance(picture, _Ready):
                    own = [next(results) for _ in picture.questions]
                    if picture.index in todo:
                        scored.append(pool.submit(_score, picture, own, settings))
                elif picture["index"] in todo:
                    scored.append(pool.submit(lambda record: record, picture))
            write(waiting)
            waiting = scored
        write(waiting)
    finally:
        pool.shutdown(cancel_futures=True)


def missing(window: Iterable[int], journal: Journal) -> list[int]:
    """Pictures without an answer; one that could not be read is tried again."""
    return [i for i in window if i not in journal.records or "error" in journal.records[i]]


class _Ready(NamedTuple):
    """A picture on its way to the device."""

    index: int
    item: Item
    image: PreparedImage
    questions: list[str]
    answers: list[str]


def _asked(
    segmenters: Sequence[Segmenter], settings: Settings, windows: Iterable[list[Any]]
) -> Iterator[tuple[list[Any], list[Segmentation]]]:
    """The windows in order, with the answers to all questions about their pictures."""

    def ask(segmenter: Segmenter, window: list[Any]) -> list[Segmentation]:
        return _ask(segmenter, settings, [picture for picture in window if isinstance(picture, _Ready)])

    if len(segmenters) == 1:  # in this thread, which Ctrl-C ends between two programs
        yield from ((window, ask(segmenters[0], window)) for window in windows)
        return
    free: queue.SimpleQueue[Segmenter] = queue.SimpleQueue()
    for segmenter in segmenters:
        free.put(segmenter)

    def ask_any(window: list[Any]) -> list[Segmentation]:
        segmenter = free.get()
        try:
            return ask(segmenter, window)
        finally:
            free.put(segmenter)

    pool = ThreadPoolExecutor(len(segmenters))
    asked: deque[tuple[list[Any], Future[list[Segmentation]]]] = deque()
    try:
        for window in windows:
            asked.append((window, pool.submit(ask_any, window)))
            if len(asked) > len(segmenters):  # the next one waits for the first that is free
                window, found = asked.popleft()
                yield window, found.result()
        while asked:
            window, found = asked.popleft()
            yield window, found.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _ask(segmenter: Segmenter, settings: Settings, pictures: Sequence[_Ready]) -> list[Segmentation]:
    """Answers to all questions of the pictures, in order."""
    if settings.mode == "forced":
        given = [(p.image, q, a) for p in pictures for q, a in zip(p.questions, p.answers, strict=True)]
        return segmenter.segment_forced(given, settings.conversation)
    asked = [(p.image, question) for p in pictures for question in p.questions]
    return segmenter.segment_batch(asked, settings.conversation, settings.max_new_tokens or 1)


def _prepare(
    index: int, source: Source, segmenter: Segmenter, settings: Settings, lock: threading.Lock
) -> _Ready | dict[str, Any]:
    """The picture as the networks take it, and its questions; when it is unusable, the record of why."""
    item = None
    try:
        with lock:  # a source need not be safe to read from several threads; pictures and masks are
            item = source[index]
        questions, answers = item.questions, item.answers
        for question, answer in zip(questions, answers, strict=True):
            if settings.mode == "forced":
                segmenter.prepare_answer(question, answer, settings.conversation)
            else:
                segmenter.prepare_prompt(question, settings.conversation)
        pixels = item.load_image()  # not item.image, which the item would keep
        if pixels.shape[:2] != (item.height, item.width):
            raise ImageError(
                f"{item.image_path or item.key}: the picture has {pixels.shape[0]}x{pixels.shape[1]} pixels, "
                f"its masks {item.height}x{item.width} (height x width)."
            )
        return _Ready(index, item, segmenter.prepare_image(pixels), questions, answers)
    except (ReadJaxError, OSError) as error:
        return _failure(index, item, error)


def _score(picture: _Ready, results: Sequence[Segmentation], settings: Settings) -> dict[str, Any]:
    """The journal's record of a picture."""
    item = picture.item
    try:
        questions = [
            _question(item, number, question, result, settings)
            for number, (question, result) in enumerate(zip(picture.questions, results, strict=True))
        ]
    except (ReadJaxError, OSError) as error:
        return _failure(picture.index, item, error)
    return {
        "index": picture.index,
        "key": item.key,
        "image": item.image_path,
        "height": int(item.height),
        "width": int(item.width),
        "questions": questions,
    }


def _question(
    item: Item, number: int, question: str, result: Segmentation, settings: Settings
) -> dict[str, Any]:
    query: Query = item.queries[number]
    used = 1 if settings.compat == "read" else len(result.masks)
    pred = np.asarray(result.masks[:used].any(axis=0))
    target = item.compact_mask(number).decode()
    counted = counts(pred[None], target[None], settings.compat)
    estimate = float(result.iou[:used].mean()) if len(result.iou) else math.nan
    found = bool(pred.any())
    return {
        "phrase": query.phrase,
        "question": question,
        "is_sentence": bool(query.is_sentence),
        "kind": query.tags[0] if query.tags else None,
        "tags": list(query.tags[1:]),
        "ref_id": int(query.ref_id),
        "sent_id": int(query.sent_id),
        "exists": bool(query.exists),
        "pred_exists": found if settings.mode == "generate" else None,
        "text": result.text,
        "iou_estimate": estimate if math.isfinite(estimate) else None,
        "intersection": int(counted.intersection[0]),
        "union": int(counted.union[0]),
        "target_pixels": int(counted.target[0]),
        "pred_pixels": int(counted.predicted[0]),
        "valid_pixels": int(counted.valid[0]),
        "mask": mask_to_rle(pred) if found else None,
    }


def _failure(index: int, item: Item | None, error: Exception) -> dict[str, Any]:
    key, image = (item.key, item.image_path) if item else (None, None)
    return {"index": index, "key": key, "image": image, "error": str(error)}


def _ahead(
    pool: ThreadPoolExecutor, prepare: Callable[[int], Any], windows: Iterable[Sequence[int]], ahead: int
) -> Iterator[list[Any]]:
    """The windows in order, their pictures prepared in threads while earlier ones are used, so many ahead."""
    coming: deque[list[Future[Any]]] = deque()
    for window in windows:
        coming.append([pool.submit(prepare, index) for index in window])
        if len(coming) > ahead:
            yield [future.result() for future in coming.popleft()]
    while coming:
        yield [future.result() for future in coming.popleft()]
