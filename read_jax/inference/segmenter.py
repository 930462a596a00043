"""`load` a model folder and ask it questions about pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from read_jax.config import ReadConfig
from read_jax.errors import ConfigError
from read_jax.geometry import image_geometry, stack_geometries
from read_jax.images.decode import read_image
from read_jax.images.preprocess import clip_crop, sam_resize
from read_jax.inference.batch import Answer, Batch, Clock, PreparedImage, token_rows
from read_jax.inference.programs import Programs, bucket
from read_jax.inference.request import (
    PreparedAnswer,
    PreparedPrompt,
    check_sampling,
    prepare_answer,
    prepare_prompt,
)
from read_jax.inference.tracing import trace_answer
from read_jax.models.read import ImageFeatures, MaskPrediction, Prefix
from read_jax.sharding import MeshConfig, make_mesh, parameter_shardings
from read_jax.text.conversation import Template, get_template
from read_jax.text.tokenizer import Tokenizer
from read_jax.weights.checkpoint import UPSTREAM, load_config, model_folder, model_leaves
from read_jax.weights.model import load_model

Image = Any
"""A path, encoded bytes, a PIL image, a uint8 array [h, w, 3], or a `PreparedImage`."""

DEFAULT_TEMPLATE = "llava_v1"

ROWS_PER_BATCH = 32
"""Answers that are decoded together, unless a `Segmenter` is made for another number."""


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """The answer to one question about one picture; M masks, one per [SEG] in the text.

    Attributes:
        text: the answer, [SEG] included.
        present: whether something was segmented: False without [SEG], and when every mask is empty.
        masks: bool [M, h, w] at the original size.
        points: float32 [M, P, 2], (x, y) in original pixels; P is 0 when SasP is off.
        point_labels: int32 [M, P], 1 foreground, 0 background, -1 neutral.
        similarity: float32 [M, N], dot product of the [SEG] state with every image token, raster
            order over the central square of the picture.
        iou: float32 [M], SAM's own estimate of each mask's quality.
        output_ids: int32 [n], the answer's tokens, end token included.
        timings: seconds per stage of the batch this question was answered in.
    """

    text: str
    present: bool
    masks: np.ndarray
    points: np.ndarray
    point_labels: np.ndarray
    similarity: np.ndarray
    iou: np.ndarray
    output_ids: np.ndarray
    timings: Mapping[str, float]


def default_images_per_batch() -> int:
    """Pictures that go through the device together: one fills the cores of a CPU."""
    return 1 if jax.default_backend() == "cpu" else 8


def load(model_dir: str | Path, *, dtype: str | None = None, devices: int = 1) -> Segmenter:
    """Load a model folder made by `read-jax convert`.

    Args:
        model_dir: the folder, or "nano": the small model that comes with the package.
        dtype: "float32" or "bfloat16" to compute and keep weights in; None: as stored.
        devices: how many of this process's devices share the language model and CLIP, heads and hidden
            channels apart; for a model that is too large for one.

    Raises:
        CheckpointError: the folder is missing, incomplete or corrupt.
        ConfigError: an unknown dtype, or the devices cannot share the model.
    """
    return load_copies(model_dir, dtype=dtype, devices=devices, copies=1)[0]


def load_copies(
    model_dir: str | Path, *, dtype: str | None = None, devices: int = 1, copies: int | None = None
) -> list[Segmenter]:
    """A model several times, each on devices of its own, so that they can answer at once, in threads.

    Args:
        model_dir, dtype: as for `load`.
        devices: that share each copy.
        copies: None: as many as this process's devices are enough for.

    Raises `CheckpointError` and `ConfigError` as `load`.
    """
    groups = device_groups(devices, copies)
    model_dir = model_folder(model_dir)
    config = load_config(model_dir)  # these two are quick to fail, so before the weights
    tokenizer = Tokenizer.load(model_dir / UPSTREAM)
    model = load_model(model_dir, dtype=dtype, shardings=_places(config, groups[0]))
    graphdef, params = nnx.split(model)
    return [
        Segmenter(model.config, graphdef, params if i == 0 else _copied(params, group), tokenizer)
        for i, group in enumerate(groups)
    ]


def device_groups(devices: int, copies: int | None = None) -> list[list[Any]]:
    """This process's devices for so many copies of a model, as for `load_copies`; raises `ConfigError`."""
    here = jax.local_devices()
    if not 1 <= devices <= len(here):
        raise ConfigError(f"this process has {len(here)} device(s); the model cannot be shared by {devices}.")
    most = len(here) // devices
    if copies is not None and not 1 <= copies <= most:
        raise ConfigError(
            f"this process has {len(here)} device(s), enough for {most} copies of the model on {devices} "
            f"each, not for {copies}."
        )
    count = most if copies is None else copies
    return [here[i * devices : (i + 1) * devices] for i in range(count)]


def _places(config: ReadConfig, devices: Sequence[Any]) -> dict[str, NamedSharding] | None:
    """Of the parameters, by path; None: all on the first device."""
    if len(devices) == 1:
        return None
    shapes = {path: leaf.shape for path, leaf in model_leaves(config).items()}
    return parameter_shardings(config, shapes, _shared_by(devices))


def _copied(params: Any, devices: Sequence[Any]) -> Any:
    """The same parameters on other devices, shared by these as by those."""
    if len(devices) == 1:
        return jax.device_put(params, devices[0])
    mesh = _shared_by(devices)
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, x.sharding.spec)), params)


def _shared_by(devices: Sequence[Any]) -> Mesh:
    return make_mesh(MeshConfig(tensor=len(devices)), devices)


class Segmenter:
    """Answers questions about pictures with text, masks and points.

    Encoders and prefix run once per image however many questions are asked about it in a batch.

    Args:
        config: the architecture.
        graphdef, params: `nnx.split` of a `Read`.
        tokenizer: with [SEG] among its tokens.
        images_per_batch: pictures that go through the device together.
        rows_per_batch: answers that are decoded together, and [SEG] tokens whose masks are made together.
            Memory grows with it: a READ-7B row of 512 new tokens holds 0.3 GB of keys and values.
    """

    def __init__(
        self,
        config: ReadConfig,
        graphdef: Any,
        params: Any,
        tokenizer: Tokenizer,
        *,
        images_per_batch: int | None = None,
        rows_per_batch: int = ROWS_PER_BATCH,
    ):
        self.config = config
        self.tokenizer = tokenizer
        if images_per_batch is None:
            images_per_batch = default_images_per_batch()
        if images_per_batch < 1:
            raise ValueError(f"images_per_batch must be at least 1, not {images_per_batch}.")
        if rows_per_batch < images_per_batch:
            raise ValueError(f"rows_per_batch must be at least images_per_batch, not {rows_per_batch}.")
        self.images_per_batch = images_per_batch
        self.rows_per_batch = rows_per_batch
        self.seg_id = tokenizer.seg_id
        exact = jax.tree.leaves(params)[0].dtype == jnp.float32
        self.programs = Programs(graphdef, params, end_id=tokenizer.eos_id, exact=exact)

    def segment(
        self,
        image: Image,
        prompt: str,
        conversation: str = DEFAULT_TEMPLATE,
        max_new_tokens: int = 512,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Segmentation:
        """Ask one question; see `segment_batch`."""
        return self.segment_batch(
            [(image, prompt)], conversation, max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
        )[0]

    def segment_batch(
        self,
        requests: Sequence[tuple[Image, str]],
        conversation: str = DEFAULT_TEMPLATE,
        max_new_tokens: int = 512,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[Segmentation]:
        """Ask several questions; answers come in the order of the requests.

        Args:
            requests: (image, prompt) pairs. The prompt goes in verbatim after the picture. Questions
                about the same picture (the same path or the same object) share its computation.
            conversation: "llava_v1", "vicuna_v1" or "llava_llama_2", as the checkpoint was trained.
            max_new_tokens: the longest answer; cut to the context that is left.
            temperature: 0 for greedy decoding, else the softness of the sampling distribution.
            top_p: sample among the likeliest tokens that together have this probability.
            seed: of the sampling; a question's answer does not depend on the rest of its batch.

        Raises:
            PromptError: an empty prompt, one with control tokens, or one beyond the context length.
            ImageError: a picture that cannot be decoded.
        """
        check_sampling(max_new_tokens, temperature, top_p, seed)
        template = get_template(conversation)
        prompts = [self.prepare_prompt(prompt, template) for _, prompt in requests]
        sampling = (temperature, top_p, seed) if temperature else None
        return self._in_batches(
            [image for image, _ in requests],
            prompts,
            lambda batch, asked: self._generate(
                batch, [[prompts[i] for i in group] for group in asked], max_new_tokens, sampling
            ),
        )

    def segment_forced(
        self, requests: Sequence[tuple[Image, str, str]], conversation: str = DEFAULT_TEMPLATE
    ) -> list[Segmentation]:
        """Give the answers too, and get the masks of every [SEG] in them (teacher forcing).

        As in training, and as the paper validates ReasonSeg and RefCOCO. Nothing is generated: `text` is the
        answer that was given. As `segment_batch`, questions about the same picture share its computation.

        Args:
            requests: (image, prompt, answer).
            conversation: as for `segment_batch`.

        Raises:
            PromptError: as `segment_batch`, the answer counting towards the context length.
            ImageError: a picture that cannot be decoded.
        """
        template = get_template(conversation)
        forced = [self.prepare_answer(prompt, answer, template) for _, prompt, answer in requests]
        return self._in_batches(
            [image for image, _, _ in requests],
            [answer.prompt for answer in forced],
            lambda batch, asked: self._force(batch, [[forced[i] for i in group] for group in asked]),
        )

    def trace(
        self, image: Image, prompt: str, answer: str | None = None, conversation: str = DEFAULT_TEMPLATE
    ) -> dict[str, np.ndarray]:
        """Every stage of the forward pass over one question and its answer, as host arrays.

        With `answer` the model is teacher-forced (as in training and in the paper's validation);
        without, it first generates. Names, shapes and frames: `read_jax.inference.tracing`.
        """
        return trace_answer(self, image, prompt, answer, conversation)

    def prepare_image(self, image: Image) -> PreparedImage:
        """Decode and resize a picture on the host (in any thread); raises `ImageError`."""
        if isinstance(image, PreparedImage):
            return image
        pixels = read_image(image)
        height, width = pixels.shape[:2]
        clip, sam = self.config.clip, self.config.sam
        geometry = image_geometry(height, width, self.config.sasp, clip.grid_size, sam.image_size)
        return PreparedImage(
            clip_crop(pixels, clip.image_size), sam_resize(pixels, sam.image_size)[0], geometry
        )

    def prepare_prompt(self, prompt: str, template: str | Template) -> PreparedPrompt:
        """Tokens of an open prompt; raises `PromptError`."""
        return prepare_prompt(prompt, template, self.config, self.tokenizer)

    def prepare_answer(self, prompt: str, answer: str, template: str | Template) -> PreparedAnswer:
        """Tokens of a question and its answer; raises `PromptError`."""
        return prepare_answer(prompt, answer, template, self.config, self.tokenizer)

    def encode(self, images: Sequence[PreparedImage], prefix: PreparedPrompt) -> tuple[ImageFeatures, Prefix]:
        """Encoders and shared prefix of a batch of images (padded to a bucket by repeating the last)."""
        padded = [images[min(i, len(images) - 1)] for i in range(bucket(len(images)))]
        features = self.programs.encode(
            np.stack([image.clip_pixels for image in padded]),
            np.stack([image.sam_pixels for image in padded]),
            stack_geometries([image.geometry for image in padded]),
        )
        return features, self.programs.prefix(prefix.prefix, features.image_tokens, prefix.image_start)

    def predict(
        self,
        states: jax.Array,
        at: np.ndarray,
        images: Sequence[PreparedImage],
        features: ImageFeatures,
        prefix: Prefix,
        image_start: int,
    ) -> MaskPrediction:
        """Points and low-resolution masks of the [SEG] states at `at` [R, 3] (image, question, token)."""
        padded = [images[min(i, len(images) - 1)].geometry for i in range(bucket(len(images)))]
        return self.programs.predict(states, at, prefix, features, stack_geometries(padded), image_start)

    def _in_batches(
        self,
        images: Sequence[Image],
        prompts: Sequence[PreparedPrompt],
        answer: Callable[[Batch, Sequence[Sequence[int]]], list[Segmentation]],
    ) -> list[Segmentation]:
        """Encode each picture once and have its questions answered: `answer(batch, numbers)` takes the
        requests' numbers by picture."""
        groups: dict[Any, list[int]] = {}
        for index, image in enumerate(images):
            groups.setdefault(_identity(image), []).append(index)
        results: dict[int, Segmentation] = {}
        members = sorted(groups.values(), key=len)  # pictures with as many questions go together
        for first in range(0, len(members), self.images_per_batch):
            chunk = members[first : first + self.images_per_batch]
            pictures = [self.prepare_image(images[group[0]]) for group in chunk]
            clock = Clock()
            prompt = prompts[chunk[0][0]]
            features, prefix = self.encode(pictures, prompt)
            clock.lap("encode", (features, prefix))
            batch = Batch(pictures, features, prefix, len(prompt.prefix), prompt.image_start, clock)
            together = max(self.rows_per_batch // bucket(len(pictures)), 1)  # questions of each picture
            for start in range(0, max(map(len, chunk)), together):
                turn = [group[start : start + together] for group in chunk]
                results.update(zip([i for group in turn for i in group], answer(batch, turn), strict=True))
        return [results[index] for index in range(len(images))]

    def _generate(
        self,
        batch: Batch,
        prompts: Sequence[Sequence[PreparedPrompt]],
        max_new_tokens: int,
        sampling: tuple[float, float, int] | None,
    ) -> list[Segmentation]:
        """Answers to the questions about each picture, picture by picture."""
        ids, lengths = token_rows([[prompt.question for prompt in group] for group in prompts])
        # each row to the end of the context by itself: a long neighbour must not shorten an answer
        room = self.config.llama.max_position_embeddings - batch.prefix_length - lengths
        seeded = sampling and (*sampling[:2], np.full(lengths.shape, sampling[2], np.uint32))
        limits = np.minimum(max_new_tokens, room)
        generated = self.programs.generate(batch.prefix, ids, lengths, limits, seeded)
        tokens, counts = np.asarray(generated.tokens), np.asarray(generated.counts)
        batch.clock.lap("generate", generated)
        answers = []
        for b, group in enumerate(prompts):
            for q in range(len(group)):
                out = tokens[b, q, : counts[b, q]]
                text = self.tokenizer.decode(out.tolist())
                answers.append(Answer(b, q, text, out, np.flatnonzero(out == self.seg_id)))
        return self._segmentations(batch, answers, generated.states)

    def _force(self, batch: Batch, given: Sequence[Sequence[PreparedAnswer]]) -> list[Segmentation]:
        """Masks of the given answers about each picture, picture by picture."""
        ids, _ = token_rows([[answer.prompt.question for answer in group] for group in given])
        states = self.programs.teacher_force(batch.prefix, ids)
        batch.clock.lap("force", states)
        answers = []
        for b, group in enumerate(given):
            for q, answer in enumerate(group):
                # the state before each [SEG] predicts it; a prompt has none, so all lie after the prefix
                seg = np.flatnonzero(answer.prompt.question == self.seg_id) - 1
                answers.append(Answer(b, q, answer.text, answer.output_ids, seg))
        return self._segmentations(batch, answers, states)

    def _segmentations(
        self, batch: Batch, answers: Sequence[Answer], states: jax.Array
    ) -> list[Segmentation]:
        """The answers with their masks, from the states [B, Q, T, D] of their rows."""
        at = [(answer.image, answer.question, place) for answer in answers for place in answer.seg]
        fields = self._masks(batch, np.asarray(at, np.int32).reshape(-1, 3), states)
        batch.clock.lap("masks", None)
        results = []
        row = 0
        for answer in answers:
            rows = slice(row, row + len(answer.seg))
            row = rows.stop
            geometry = batch.images[answer.image].geometry
            none = np.zeros((0, int(geometry.height), int(geometry.width)), bool)
            masks = np.stack(fields["masks"][rows]) if len(answer.seg) else none
            results.append(
                Segmentation(
                    text=answer.text,
                    present=bool(masks.any()),
                    masks=masks,
                    points=fields["points"][rows],
                    point_labels=fields["labels"][rows],
                    similarity=fields["similarity"][rows],
                    iou=fields["iou"][rows],
                    output_ids=answer.output_ids,
                    timings=dict(batch.clock.laps),
                )
            )
        return results

    def _masks(self, batch: Batch, at: np.ndarray, states: jax.Array) -> dict[str, Any]:
        """Host arrays for the R [SEG] tokens at `at`; masks as a list, since sizes differ."""
        sasp = self.config.sasp
        points = sasp.num_points if sasp.enabled else 0
        masks: list[np.ndarray] = []
        parts = {
            "points": [np.zeros((0, points, 2), np.float32)],
            "labels": [np.zeros((0, points), np.int32)],
            "similarity": [np.zeros((0, self.config.clip.num_image_tokens), np.float32)],
            "iou": [np.zeros((0,), np.float32)],
        }
        for first in range(0, len(at), self.rows_per_batch):
            rows = at[first : first + self.rows_per_batch]
            out = self.predict(states, rows, batch.images, batch.features, batch.prefix, batch.image_start)
            for row, (b, _, _) in enumerate(rows):
                masks.append(self.programs.mask(out.low_res_masks[row], batch.images[b].geometry) > 0)
            found = (out.points.points, out.points.labels, out.similarity, out.iou)
            for part, values in zip(parts.values(), found, strict=True):
                part.append(np.asarray(values)[: len(rows)].astype(part[0].dtype))
        return {"masks": masks} | {name: np.concatenate(part) for name, part in parts.items()}


def _identity(image: Image) -> Any:
    """Equal for requests about the same picture: equal paths or bytes, or the same object."""
    return (type(image), image) if isinstance(image, str | Path | bytes) else (type(image), id(image))
