"""What a training run is made of, as strict configuration; and the recipes that fill it.

    config = load_config("read_7b_reasonseg", ["data.data_dir=/data", "optimizer.learning_rate=1e-4"])

A recipe is a file with `get_config()`, which returns `ml_collections.ConfigDict` with the keys of
`TrainConfig`: one of the package's own by its name, or the path of another. ":runlocal" after it makes it
small: a tiny new model on drawn scenes for a few steps, with everything else as the recipe says.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib.util
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from ml_collections import ConfigDict

import read_jax
from read_jax.config import ClipVisionConfig, Config, LlamaConfig, ReadConfig, SamConfig, SaspConfig
from read_jax.data.packing import Limits
from read_jax.errors import ConfigError
from read_jax.sharding import MeshConfig
from read_jax.training.lora import LoraConfig
from read_jax.training.objective import LossWeights
from read_jax.training.optimizer import OptimizerConfig
from read_jax.training.step import TRAINABLE, StepConfig, is_chosen

RUNLOCAL = "runlocal"
_NAMED_FREELY = "data.rates."
ENCODERS = ("clip", "sam.image_encoder")
"""Dotted paths of the vision encoders."""


@dataclasses.dataclass(frozen=True)
class TeachingConfig(Config):
    """Lessons for a new model's eyes; see `read_jax.training.teaching`.

    Attributes:
        updates: how many lessons; batch: pictures in each.
        learning_rate: the peak, reached after `warmup_updates`; it falls to zero from there.
        seed: of the pictures.
    """

    updates: int = 3000
    batch: int = 16
    learning_rate: float = 1.5e-3
    warmup_updates: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        self._require_positive("updates", "batch", "learning_rate")
        self._require(
            0 <= self.warmup_updates <= self.updates // 2,
            f"warmup_updates must be at most half of the {self.updates} updates, not {self.warmup_updates}.",
        )
        self._require(0 <= self.seed < 2**62, f"seed must be in [0, 2**62), not {self.seed}.")


@dataclasses.dataclass(frozen=True)
class StartConfig(Config):
    """What training starts from: a model folder, or a new model.

    Attributes:
        model: folder made by `read-jax convert`.
        scratch: the architecture of a new model instead; its vocabulary becomes the tokenizer's.
        tokenizer: folder with the new model's tokenizer; "": one is made of the words of the training data.
        vocabulary: its size, when it is made.
        seed: of the new model's parameters.
        teaching: lessons for the new model's eyes, its vision tower and projector; None for none.
        sasp: point settings to train with, by name; None: the model's own.
        continuous: whether chosen points move to their differentiable expectation; False: they stay at
            whole cells, whatever the settings say.
    """

    model: str = ""
    scratch: ReadConfig | None = None
    tokenizer: str = ""
    vocabulary: int = 1000
    seed: int = 0
    teaching: TeachingConfig | None = None
    sasp: Literal["7b", "13b", "paper", "off"] | None = None
    continuous: bool = True

    def __post_init__(self) -> None:
        self._require(not (self.model and self.scratch), "give a model folder or scratch, not both.")
        self._require(not (self.teaching and not self.scratch), "teaching is for new models: set scratch.")
        self._require(self.vocabulary > 300, f"vocabulary must be above 300, not {self.vocabulary}.")

    def sasp_config(self, own: SaspConfig) -> SaspConfig:
        """The point settings to train with; own: the model's."""
        chosen = own if self.sasp is None else SaspConfig.preset(self.sasp)
        return dataclasses.replace(chosen, continuous=chosen.continuous and self.continuous)


@dataclasses.dataclass(frozen=True)
class DataConfig(Config):
    """What is trained on, and the shapes it is brought to.

    Attributes:
        mixture: name of one of `read_jax.data.recipes.RECIPES`; or
        rates: how often each source is drawn, by its name.
        data_dir: folder with the datasets.
        compat: "read" for the original's defects.
        false_premises: whether anything is asked about things that are not there, made up or the dataset's.
        templates: words around questions and answers: "varied", "short" (mostly the fixed ones of
            evaluation), or a file; see `read_jax.data.prompts`.
        template: of the conversations.
        global_batch: pictures per update, over all devices.
        questions: at most so many about a picture.
        tokens: length of a question with its answer.
        mask_canvas: (height, width) of the targets; larger ones are scaled down to fit.
        workers, buffer: processes that prepare batches, and how far ahead each goes.
        seed: of what is drawn.
        max_bad_share: stop when a larger share of the pictures cannot be used.
        features: folder made by `read-jax cache`, with what the frozen vision encoders say of the pictures:
            neither is run then, and no picture is decoded. "" for none.
    """

    mixture: str = ""
    rates: dict[str, float] = dataclasses.field(default_factory=dict)
    data_dir: str | None = None
    compat: Literal["read"] | None = None
    false_premises: bool = True
    templates: str = "varied"
    template: str = "llava_v1"
    global_batch: int = 16
    questions: int = 3
    tokens: int = 256
    mask_canvas: tuple[int, int] = (1024, 1024)
    workers: int = 8
    buffer: int = 2
    seed: int = 0
    max_bad_share: float = 0.05
    features: str = ""

    def __post_init__(self) -> None:
        self._require_positive("global_batch", "questions", "tokens", "buffer")
        self._require(min(self.mask_canvas) > 0, f"mask_canvas must be positive, not {self.mask_canvas}.")
        self._require(self.workers >= 0, f"workers must not be negative, not {self.workers}.")
        self._require(
            not (self.mixture and self.rates), "give a mixture by name or the rates of sources, not both."
        )

    @property
    def limits(self) -> Limits:
        """The shapes."""
        return Limits(self.questions, self.tokens, self.mask_canvas)


@dataclasses.dataclass(frozen=True)
class ValidationConfig(Config):
    """Scoring during training: the right answers are given, and the masks of their [SEG] are scored.

    Attributes:
        dataset: such as "ReasonSeg|val"; "" for none.
        every: updates between two scorings.
        limit: only the first so many pictures; 0 for all.
        batch: pictures at a time; 0: as many as a micro-batch of training.
        pictures: so many of the first pictures are drawn, with their masks and points.
    """

    dataset: str = ""
    every: int = 500
    limit: int = 0
    batch: int = 0
    pictures: int = 4

    def __post_init__(self) -> None:
        self._require_positive("every")
        self._require(min(self.limit, self.batch, self.pictures) >= 0, "no number may be negative.")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(Config):
    """What is saved. The end of a run, and a stop by a signal, are saved always.

    Attributes:
        every: updates between two checkpoints.
        keep: how many of the latest are kept.
        best: the one with the highest of this score of validation is kept too; None keeps none for it.
    """

    every: int = 500
    keep: int = 2
    best: Literal["giou", "ciou"] | None = None

    def __post_init__(self) -> None:
        self._require_positive("every", "keep")


@dataclasses.dataclass(frozen=True)
class LogConfig(Config):
    """What is written down; metrics.jsonl always is.

    Attributes:
        every: updates between two lines.
        tensorboard: write event files too.
        wandb: project of Weights & Biases to write to, which must be installed; "" for none.
    """

    every: int = 10
    tensorboard: bool = True
    wandb: str = ""

    def __post_init__(self) -> None:
        self._require_positive("every")


@dataclasses.dataclass(frozen=True)
class TrainConfig(Config):
    """A training run.

    Attributes:
        start, data, optimizer, step, mesh, validation, checkpoints, log: see their classes.
        trainable: dotted names of what is trained, "lora" for the adapters, "all" for everything.
        lora: the adapters; None for none.
        losses: weights of the losses.
        masks_from: update from which the losses of masks count; before it no masks are predicted, which saves
            their time while a new model learns to point.
        dtype: type of the computation and of the frozen parameters; the trainable ones are float32.
        updates: where the run ends; None: with the schedule.
        max_skipped: stop when so many of the latest 100 updates had to be skipped.
    """

    start: StartConfig = StartConfig()
    trainable: tuple[str, ...] = TRAINABLE
    lora: LoraConfig | None = dataclasses.field(default_factory=LoraConfig)
    losses: LossWeights = dataclasses.field(default_factory=LossWeights)
    masks_from: int = 0
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    step: StepConfig = dataclasses.field(default_factory=StepConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    data: DataConfig = DataConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    updates: int | None = None
    max_skipped: int = 10

    def __post_init__(self) -> None:
        self._require(bool(self.trainable), "trainable names nothing.")
        self._require(
            "all" in self.trainable or (self.lora is not None) == ("lora" in self.trainable),
            "adapters are trained when there are any: name 'lora' in trainable, or set lora to None.",
        )
        self._require(
            self.data.global_batch % self.step.micro_batches == 0,
            f"{self.data.global_batch} pictures cannot be cut into {self.step.micro_batches} micro-batches.",
        )
        self._require(
            not self.checkpoints.best or bool(self.validation.dataset),
            f"checkpoints.best is {self.checkpoints.best!r}, but validation has no dataset.",
        )
        self._require(
            not self.checkpoints.best or self.checkpoints.every % self.validation.every == 0,
            "with checkpoints.best, checkpoints.every must be a multiple of validation.every.",
        )
        self._require(
            not (self.data.features and self.trained_encoders),
            f"data.features keeps what the encoders say, but {', '.join(self.trained_encoders)} are trained.",
        )
        self._require_positive("max_skipped")
        self._require(self.masks_from >= 0, f"masks_from must not be negative, not {self.masks_from}.")
        self._require(
            self.updates is None or self.updates > 0, f"updates must be positive, not {self.updates}."
        )
        falls_to = self.optimizer.total_updates if self.optimizer.schedule != "constant" else math.inf
        self._require(
            self.total_updates <= falls_to,
            f"nothing is learned in {self.updates} updates after the first {falls_to}: the learning rate is "
            "nothing from there on. Set optimizer.total_updates, or optimizer.schedule=constant.",
        )

    @property
    def total_updates(self) -> int:
        """Where the run ends."""
        return self.optimizer.total_updates if self.updates is None else self.updates

    @property
    def trained_encoders(self) -> tuple[str, ...]:
        """Vision encoders of which `trainable` names something."""
        return tuple(
            part
            for part in ENCODERS
            if is_chosen(self.trainable, part) or any(n.startswith(f"{part}.") for n in self.trainable)
        )

    def trajectory(self) -> dict[str, Any]:
        """What determines the parameters at every step, ready for JSON; runs that differ in other settings
        may continue one another."""
        data = json.loads(json.dumps(self.to_dict()))
        for key in ("mesh", "validation", "checkpoints", "log", "updates", "max_skipped"):
            del data[key]
        for key in ("data_dir", "workers", "buffer", "max_bad_share"):
            del data["data"][key]
        for key in ("micro_batches", "remat"):  # how a batch fits onto the devices, which may be others
            del data["step"][key]
        if data["data"].pop("features"):
            data["data"]["features"] = "used"  # their content follows from the base
        del data["start"]["model"], data["start"]["tokenizer"]  # by content: the base's fingerprint
        return data


def default_config() -> ConfigDict:
    """`TrainConfig()` as a recipe changes it; a key that does not exist cannot be set."""
    return ConfigDict(TrainConfig().to_dict(), allow_dotted_keys=True).lock()


def recipes_folder() -> Path:
    """Where the package's recipes are: installed beside its modules, or in the source tree."""
    package = Path(read_jax.__file__).parent
    return next(f for f in (package / "configs", package.parent / "configs") if f.is_dir())


def recipe_names() -> list[str]:
    """Names of the package's recipes."""
    return sorted(f.stem for f in recipes_folder().glob("*.py") if f.stem != "__init__")


def recipe(name: str) -> ConfigDict:
    """What a recipe's `get_config()` gives: by name, or by path with ".py"; recipes build on one another so.

    Raises `ConfigError` when there is none of that name, or it fails.
    """
    path = Path(name).expanduser() if name.endswith(".py") else recipes_folder() / f"{name}.py"
    if not path.is_file():
        known = recipe_names()
        near = difflib.get_close_matches(Path(name).stem, known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"there is no recipe {name}.{hint} Known: {', '.join(known)}; or give a .py file.")
    spec = importlib.util.spec_from_file_location(f"read_jax_recipe_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return module.get_config()
    except Exception as error:  # whatever a user's file does
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{path} gives no configuration: {line}") from error


def load_config(name: str, overrides: Iterable[str] = ()) -> TrainConfig:
    """A recipe with changes.

    Args:
        name: as for `recipe`, with ":runlocal" for the small variant.
        overrides: such as "optimizer.learning_rate=1e-4"; values as in Python, other texts as they are.

    Raises `ConfigError` naming the nearest known key when a key does not exist, or when a value is wrong.
    """
    base, _, variant = name.partition(":")
    if variant not in ("", RUNLOCAL):
        raise ConfigError(f"there is no variant {variant!r} of recipes, only {RUNLOCAL!r}.")
    config = recipe(base)
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"get_config() of {base} must return a ConfigDict, not {type(config).__name__}.")
    config = ConfigDict(_completed(config.to_dict(), TrainConfig().to_dict()))
    if variant:
        config = runlocal(config)
    data = config.to_dict()
    for override in overrides:
        _override(data, override)
    return TrainConfig.from_dict(data, "config")


def _completed(given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """A recipe's settings with the defaults of those it does not mention."""
    inner = {
        key: _completed(given[key], value)
        for key, value in defaults.items()
        if isinstance(value, dict) and isinstance(given.get(key), dict)
    }
    return {**defaults, **given, **inner}


def _override(data: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"{override!r} changes nothing; write KEY=VALUE.")
    if path.startswith(_NAMED_FREELY):  # sources may be any, and files with dots in their names
        rates = data["data"].setdefault("rates", {})
        rates[path.removeprefix(_NAMED_FREELY)] = _value(text)
        return
    *sections, key = path.split(".")
    where = "config"
    for section in sections:
        if data:
            _check_key(data, section, where)
        where = f"{where}.{section}"
        if data.get(section) is None:
            data[section] = {}
        data = data[section]
        if not isinstance(data, dict):
            raise ConfigError(f"{where} is a value, not a section; it has no key {key!r}.")
    if data:  # a section that was None is checked when it is made
        _check_key(data, key, where)
    value = _value(text)
    data[key] = text if isinstance(data.get(key), str) and value is not None else value


def _check_key(data: dict[str, Any], key: str, where: str) -> None:
    if key not in data:
        near = difflib.get_close_matches(key, list(data), n=1, cutoff=0.0)
        raise ConfigError(f"{where} has no key {key!r}; the nearest known key is {near[0]!r}.")


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        try:
            return float(text)  # inf
        except ValueError:
            return text


def runlocal(recipe: ConfigDict) -> ConfigDict:
    """The recipe on a laptop: a tiny new model, all of it trained, drawn scenes, eight updates."""
    start: Any = recipe.start
    data: Any = recipe.data
    small = TrainConfig(
        start=StartConfig(scratch=TINY, sasp=start.sasp, continuous=start.continuous),
        data=DataConfig(
            rates={"scenes|train": 1.0},
            global_batch=4,
            tokens=320,
            mask_canvas=(128, 128),
            workers=0,
            compat=data.compat,
            false_premises=data.false_premises,
            templates=data.templates,
        ),
        validation=ValidationConfig("scenes|val", every=4, limit=4, batch=4, pictures=2),
        checkpoints=CheckpointConfig(every=4, keep=1),
        log=LogConfig(every=1),
    ).to_dict()
    config: Any = recipe.copy_and_resolve_references()
    with config.unlocked(), config.ignore_type():
        for section in ("start", "data", "mesh", "validation", "checkpoints", "log"):
            config[section] = small[section]
        config.trainable = ("all",)  # adapters too, where the recipe has them
        config.dtype = "float32"
        config.updates = None
        config.step.micro_batches = 2
        config.masks_from = min(config.masks_from, 4)
        config.optimizer.total_updates = 8
        config.optimizer.warmup_updates = 2
        config.optimizer.learning_rate = 1e-3
    return config


TINY = ReadConfig(
    llama=LlamaConfig(1000, 64, 128, 2, 4, 4, 16),
    clip=ClipVisionConfig(32, 64, 2, 2),
    sam=SamConfig(
        32,
        2,
        2,
        (1,),
        64,
        image_size=128,
        window_size=4,
        out_chans=32,
        decoder_num_heads=4,
        decoder_mlp_dim=64,
    ),
    prompt_dim=32,
)
"""A model for trying things out: it learns little, and quickly."""
