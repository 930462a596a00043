"""The answers of an evaluation, written down as they come, so that a stopped run goes on where it was.

A run's folder holds `answers-00000.jsonl`, and on several hosts one such file per host. The first line is the
header: what was run (`identity`), and where. Each further line is one picture:

    {"index", "key", "image", "height", "width", "questions": [...]}
    {"index", "key", "image", "error"}                                    one that could not be read

and each of its questions:

    phrase, question, is_sentence, ref_id, sent_id    as the dataset has them
    kind, tags              the first of the dataset's tags, the sort of question, or null; and the others
    exists, pred_exists     whether the thing is there, and whether the answer says so (null: it was given)
    text                    the answer
    iou_estimate            SAM's own estimate of the mask's IoU; null without a mask
    intersection, union, target_pixels, pred_pixels, valid_pixels    see `metrics.MaskCounts`
    mask                    COCO run-length encoding; null where nothing was segmented

A line is complete when it ends in a newline; a torn last one, from a run that was killed while writing, is
cut off. Of several lines about one picture the last counts, and an answer before an error.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from read_jax.errors import DataError

FORMAT = 1
_START = b'{"format":'
_PATTERN = "answers-*.jsonl"
_SYNC_SECONDS = 5.0  # at most this much is lost with the power


class Journal:
    """Appends records to this host's file of a run's folder.

    Args:
        folder: made when absent.
        identity: what the answers depend on; a run is only continued with the same.
        environment: where it runs; written down, not compared.
        host, hosts: number of this process, and of those that share the run.
        overwrite: discard an earlier run's answers; each host its own.

    Attributes:
        records: the pictures already done, by index.

    Raises:
        DataError: the folder holds another run, a damaged journal, or is being written by another process.
    """

    def __init__(
        self,
        folder: str | Path,
        identity: Mapping[str, Any],
        environment: Mapping[str, Any] | None = None,
        *,
        host: int = 0,
        hosts: int = 1,
        overwrite: bool = False,
    ):
        self.folder = Path(folder).expanduser()
        self.identity = json.loads(json.dumps(identity))  # as it will be read back
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise DataError(f"the output {self.folder} is a file; give the name of a folder.") from None
        own = self.folder / _name(host)
        self._file = open(own, "a+b")  # noqa: SIM115, closed by close()
        try:
            self._lock()
            self.records: dict[int, dict[str, Any]] = {}
            headers: dict[Path, dict[str, Any]] = {}
            if overwrite:
                self._file.truncate(0)
                if host == 0:
                    for path in self.folder.glob(_PATTERN):
                        if path.name >= _name(hosts):  # of hosts that have no part in this run
                            path.unlink()
            else:
                headers = _read_into(self.folder, self.records)
                self._cut_torn_line(own)
            for path, header in headers.items():
                self._check_same(header["identity"], path)
            if own not in headers:
                self._write(
                    {"format": FORMAT, "identity": self.identity, "environment": dict(environment or {})}
                )
            self._sync()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def append(self, record: Mapping[str, Any]) -> None:
        """Write down one picture; it is with the operating system when this returns."""
        self._write(record)
        self.records[record["index"]] = json.loads(json.dumps(record))
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            self._sync()

    def close(self) -> None:
        """Bring everything to the disk and let others write."""
        if not self._file.closed:
            self._sync()
            self._file.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line, allow_nan=False, separators=(",", ":")).encode() + b"\n")
        self._file.flush()

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def _lock(self) -> None:
        """For as long as the file is open; the system lets go of it when the process dies."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"another process is writing its answers into {self.folder}; wait for it, or choose another "
                "folder."
            ) from None
        except OSError:
            return  # a file system without locks: nothing to be had

    def _cut_torn_line(self, own: Path) -> None:
        self._file.seek(0)
        data = self._file.read()
        whole = data.rfind(b"\n") + 1
        if not whole and data[: len(_START)] != _START[: len(data)]:  # not the beginning of a header
            raise _foreign(own)
        self._file.truncate(whole)
        self._file.seek(0, io.SEEK_END)

    def _check_same(self, earlier: Mapping[str, Any], path: Path) -> None:
        names = [
            name for name in {**earlier, **self.identity} if earlier.get(name) != self.identity.get(name)
        ]
        if names:
            what = "; ".join(f"{n} was {earlier.get(n)!r}, now {self.identity.get(n)!r}" for n in names)
            raise DataError(
                f"{path} holds the answers of another run: {what}. Choose another output folder, or discard "
                "them with --overwrite."
            )


def read_records(folder: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A run's header and its pictures in the order of the dataset, all hosts' together.

    The header holds the entries of the run's identity, and "environment" with those of the first host.

    Raises `DataError` when the folder holds none, or a damaged one.
    """
    folder = Path(folder).expanduser()
    records: dict[int, dict[str, Any]] = {}
    headers = _read_into(folder, records)
    if not headers:
        raise DataError(f"{folder} holds no evaluation ({_PATTERN}); make one with: read-jax evaluate")
    first = next(iter(headers.values()))
    return first["identity"] | {"environment": first["environment"]}, [
        records[index] for index in sorted(records)
    ]


def _read_into(folder: Path, records: dict[int, dict[str, Any]]) -> dict[Path, dict[str, Any]]:
    """Collect all hosts' records by index; returns the header of each file that has one."""
    headers = {}
    for path in sorted(folder.glob(_PATTERN)):
        lines = _complete_lines(path)
        if not lines:
            continue
        header, *rest = (_parse(line, path, number) for number, line in enumerate(lines, 1))
        if header.get("format") != FORMAT or not {"identity", "environment"} <= header.keys():
            raise _foreign(path)
        for number, record in enumerate(rest, 2):
            if not isinstance(record.get("index"), int):
                raise DataError(f"{path}, line {number}: a picture without its index. {_START_AGAIN}")
            _keep(records, record)
        headers[path] = header
    return headers


def _keep(records: dict[int, dict[str, Any]], record: dict[str, Any]) -> None:
    """An answered picture is never replaced by a failure to read it, whichever host's file comes later."""
    index = record["index"]
    if "error" not in record or "error" in records.get(index, record):
        records[index] = record


def _foreign(path: Path) -> DataError:
    return DataError(f"{path} was not written by this version of read-jax evaluate; choose another folder.")


def _name(host: int) -> str:
    return f"answers-{host:05d}.jsonl"


_START_AGAIN = "Evaluate into another folder, or discard the answers with --overwrite."


def _complete_lines(path: Path) -> list[bytes]:
    with contextlib.suppress(FileNotFoundError):  # discarded by another host this very moment
        return path.read_bytes().split(b"\n")[:-1]
    return []


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise DataError(f"{path}, line {number}: damaged, not a JSON object. {_START_AGAIN}")
    return value
