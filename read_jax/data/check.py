"""Every broken record of a dataset, found before a training run or an evaluation trips over it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from read_jax.data.item import Source
from read_jax.data.jsonl import Record, parse, read_lines, record_folder
from read_jax.data.sources import load_source
from read_jax.errors import ReadJaxError
from read_jax.images.decode import read_image

Progress = Callable[[int, int], None]
"""Called as progress(done, total)."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is wrong with a record.

    Attributes:
        where: "FILE:LINE", or "DATASET: ITEM".
        message: what is wrong.
        broken: the record cannot be used; otherwise it can, but deserves a look.
    """

    where: str
    message: str
    broken: bool

    def __str__(self) -> str:
        return f"{self.where}: {'error' if self.broken else 'warning'}: {self.message}"


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        path: the file or the dataset's name.
        records: questions looked at, broken ones included.
        pictures: different pictures among the records that can be read.
        masks: sound masks.
        problems: in the order of the records.
        shares: float64 [masks], the share of its picture each mask covers, 0 to 1.
    """

    path: str
    records: int
    pictures: int
    masks: int
    problems: tuple[Problem, ...]
    shares: np.ndarray = dataclasses.field(repr=False)

    @property
    def broken(self) -> int:
        """How many records are broken."""
        return len({problem.where for problem in self.problems if problem.broken})

    @property
    def ok(self) -> bool:
        """Nothing is broken; there may be warnings."""
        return not self.broken

    def __str__(self) -> str:
        warnings = sum(not problem.broken for problem in self.problems)
        lines = [str(problem) for problem in self.problems]
        lines.append(
            f"{self.path}: {self.records} records of {self.pictures} pictures, {self.masks} sound masks; "
            f"{self.broken} broken, {warnings} warnings."
        )
        if self.masks:
            low, middle, high = np.percentile(100 * self.shares, (0, 50, 100))
            lines.append(
                f"The masks cover {low:.3g} % to {high:.3g} % of their pictures, median {middle:.3g} %."
            )
        return "\n".join(lines)


def check(path: str | Path, data_dir: str | Path | None = None, progress: Progress | None = None) -> Report:
    """Look at every record, decode every picture and mask, and list what is wrong with its place.

    Args:
        path: a file in the format of `read_jax.data.jsonl`, or a dataset's name, such as "refcoco|val".
        data_dir: what the file's paths are relative to (default: its folder), or where the datasets are.
        progress: called as progress(done, total), counted in records of a file, pictures of a dataset.

    Raises:
        DataError: there is no such file or dataset, or it cannot be read at all.
    """
    file = Path(path).expanduser()
    if file.is_file() or file.suffix in (".jsonl", ".json"):
        return _check_file(file, data_dir, progress)
    return _check_source(load_source(str(path), data_dir), progress)


class _Findings:
    """Problems and masks, collected; problems by the position of their record."""

    def __init__(self) -> None:
        self.problems: list[tuple[int, Problem]] = []
        self.shares: list[float] = []

    def add(self, position: int, where: str, error: ReadJaxError | str, broken: bool = True) -> None:
        self.problems.append((position, Problem(where, str(error), broken)))

    def report(self, path: str, records: int, pictures: int) -> Report:
        ordered = tuple(problem for _, problem in sorted(self.problems, key=lambda pair: pair[0]))
        return Report(path, records, pictures, len(self.shares), ordered, np.array(self.shares, np.float64))


def _check_file(file: Path, data_dir: str | Path | None, progress: Progress | None) -> Report:
    found, lines = _Findings(), list(read_lines(file))
    folder = record_folder(file, data_dir)
    pictures: dict[str, list[Record]] = {}
    asked: dict[tuple[str, str], int] = {}
    done = 0
    for line, text in lines:
        try:
            record = parse(text, line, folder)
        except ReadJaxError as error:
            found.add(line, f"{file}:{line}", error)
            done += 1
            continue
        pictures.setdefault(record.image, []).append(record)
        first = asked.setdefault((record.image, record.query.phrase), line)
        if first != line:
            found.add(line, f"{file}:{line}", f"asks the same of the same picture as line {first}.", False)
    for image, records in pictures.items():
        _check_picture(file, image, records, found)
        done += len(records)
        if progress:
            progress(done, len(lines))
    return found.report(str(file), len(lines), len(pictures))


def _check_picture(file: Path, image: str, records: list[Record], found: _Findings) -> None:
    try:
        height, width = read_image(image).shape[:2]
    except ReadJaxError as error:
        for record in records:
            found.add(record.line, f"{file}:{record.line}", error)
        return
    for record in records:
        where = f"{file}:{record.line}"
        if not record.query.exists:
            continue
        warnings: list[str] = []
        try:
            mask = record.mask(height, width, warnings.append).decode()
        except ReadJaxError as error:
            found.add(record.line, where, error)
        else:
            found.shares.append(float((mask == 1).mean()))
        for warning in warnings:
            found.add(record.line, where, warning, broken=False)


def _check_source(source: Source, progress: Progress | None) -> Report:
    found, records = _Findings(), 0
    for index in range(len(source)):
        where = f"{source.name}: item {index}"
        try:
            item = source[index]
            where = f"{source.name}: {item.key}"
            records += len(item.queries)
            item.load_image()  # not item.image, which would be kept
        except ReadJaxError as error:
            found.add(index, where, error)
        else:
            for i, query in enumerate(item.queries):
                if not query.exists:
                    continue
                try:
                    mask = item.compact_mask(i).decode()
                except ReadJaxError as error:
                    found.add(index, f"{where}, question {i}", error)
                    continue
                found.shares.append(float(((mask != 0) & (mask != 255)).mean()))
                if not found.shares[-1]:
                    found.add(index, f"{where}, question {i}", "its target has no pixel.", broken=False)
        if progress:
            progress(index + 1, len(source))
    return found.report(source.name, records, len(source))
