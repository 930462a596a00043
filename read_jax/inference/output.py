"""What `read-jax segment` leaves in its output folder: pictures to look at and one `result.json`.

Per image and prompt:

    NAME_mask.png        0 / 255 at the original size; the union when the answer has several [SEG]
    NAME_mask1.png ...   each of them alone, when there are several
    NAME_overlay.png     the masks over the picture
    NAME_similarity.png  the similarity map of the first [SEG], with its points

Every file appears whole or not at all, and `result.json` lists what the run has made: one that is stopped
leaves the answers it had finished. The results of another run are never mixed in: they are refused, or
replaced as a whole.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from read_jax.errors import ReadJaxError
from read_jax.files import write_file
from read_jax.images.drawing import draw_overlay, draw_similarity
from read_jax.images.masks import mask_to_rle
from read_jax.inference.segmenter import Segmentation

RESULT = "result.json"
_STEM_BYTES = 150  # of an image's name in a result's: file systems allow 255 for the whole


class OutputError(ReadJaxError):
    """The folder for the results cannot be used."""


class ResultFolder:
    """Writes results into a folder; a context that takes the folder away again if nothing was finished.

    Args:
        folder: made when absent.
        header: what `result.json` says of the whole run (version, model, settings).
        overwrite: replace the results of an earlier run, once the first answer of this one is there.

    Raises:
        OutputError: the folder cannot be made or written, or holds results and `overwrite` is off.
    """

    def __init__(self, folder: str | Path, header: Mapping[str, Any], *, overwrite: bool = False):
        self.folder = Path(folder)
        self._earlier = _earlier_files(self.folder, overwrite)
        self._header = dict(header)
        self._results: list[dict[str, Any]] = []
        self._names: set[str] = set()
        self._made: list[Path] = []

    def __enter__(self) -> ResultFolder:
        missing = [p for p in (self.folder, *self.folder.parents) if not p.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise OutputError(f"the output {self.folder} is a file; give the name of a folder.") from None
        except OSError as error:
            reason = error.strerror or error
            raise OutputError(f"the output folder {self.folder} cannot be made: {reason}.") from None
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise OutputError(f"no permission to write into the output folder {self.folder}.")
        self._made = missing
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None or self._results:
            return
        for path in self._made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()

    def add(self, source: str, prompt: str, image: np.ndarray, result: Segmentation) -> dict[str, Any]:
        """Write the pictures of one answer and add it to `result.json`; returns its entry."""
        for path in self._earlier:  # result.json first: it must never list what is gone
            path.unlink(missing_ok=True)
        self._earlier = []
        name = self._name(source)
        height, width = image.shape[:2]
        union = np.zeros((height, width), bool)
        for mask in result.masks:
            union |= mask
        pictures = {"mask": _mask_picture(union), "overlay": draw_overlay(image, result.masks)}
        if len(result.masks) > 1:
            pictures |= {f"mask{i + 1}": _mask_picture(mask) for i, mask in enumerate(result.masks)}
        if len(result.similarity):
            pictures["similarity"] = draw_similarity(
                image, _square_map(result.similarity[0]), result.points[0], result.point_labels[0]
            )
        entry = {
            "image": source,
            "prompt": prompt,
            "text": result.text,
            "present": result.present,
            "size": [height, width],
            "masks": [mask_to_rle(mask) for mask in result.masks],
            "points": result.points.tolist(),
            "point_labels": result.point_labels.tolist(),
            "iou": [value if math.isfinite(value) else None for value in result.iou.tolist()],
            "timings": {key: round(value, 4) for key, value in result.timings.items()},
            "files": {kind: f"{name}_{kind}.png" for kind in pictures},
        }
        written: list[Path] = []
        try:
            for kind, picture in pictures.items():
                buffer = io.BytesIO()
                Image.fromarray(picture).save(buffer, format="PNG")
                written.append(self.folder / f"{name}_{kind}.png")
                write_file(written[-1], buffer.getvalue())
            document = self._header | {"results": [*self._results, entry]}
            write_file(self.folder / RESULT, (json.dumps(document, indent=1) + "\n").encode())
        except BaseException:
            for path in written:  # not listed in result.json, so it must not stay
                path.unlink(missing_ok=True)
            raise
        self._results.append(entry)
        return entry

    def _name(self, source: str) -> str:
        stem, number = Path(source).stem, 1
        while len(os.fsencode(stem)) > _STEM_BYTES:
            stem = stem[:-1]
        # some file systems do not tell Photo from photo
        while (name := f"{stem}_{number}").casefold() in self._names:
            number += 1
        self._names.add(name.casefold())
        return name


def _earlier_files(folder: Path, overwrite: bool) -> list[Path]:
    """What an earlier run left in the folder: its result.json, then the pictures that names."""
    result = folder / RESULT
    if not result.exists():
        return []
    if not overwrite:
        raise OutputError(
            f"{folder} holds the results of an earlier run ({RESULT}); pass --overwrite to replace them, or "
            f"choose another folder."
        )
    try:
        entries = json.loads(result.read_bytes())["results"]
        names = [name for entry in entries for name in entry["files"].values()]
        if any(Path(name).name != name for name in names):
            raise ValueError("it names files elsewhere")
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise OutputError(
            f"{result} was not written by read-jax segment; it is not overwritten. Choose another folder."
        ) from None
    return [result, *(folder / name for name in names)]


def _square_map(similarity: np.ndarray) -> np.ndarray:
    """The values of the patches, without a class token before them."""
    return similarity[-(math.isqrt(len(similarity)) ** 2) :]


def _mask_picture(mask: np.ndarray) -> np.ndarray:
    return mask.astype(np.uint8) * 255
