"""What a training run is: dataclasses read from a YAML file and `key=value` overrides. An unknown key is an error.

    sphinx-fast train stage2 CONFIG.yaml optimizer.rate=1e-5 data.0.ratio=0.5

Defaults are the paper's (arXiv 2311.07575, section 4.1); docs/training.md has every key with its meaning.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from sphinx_fast.model.image_processor import TRANSFORMS

T = TypeVar("T")


@dataclass(frozen=True)
class DataSettings:
    """One data set: see docs/data.md for the types. `ratio`: share of its rows seen in an epoch (2: each twice).
    `options` go to the reader."""

    path: Any = ()
    type: str = "llava"
    root: str | None = None
    ratio: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW, linear warm-up, half a cosine down to `min_rate`. Norms and biases never decay."""

    rate: float
    min_rate: float
    warmup_steps: int | None = None
    warmup_epochs: float | None = None
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip: float = 8.0  # of the global gradient norm, as released; the paper gives none


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters (PEFT) in place of the language model's own weights. The fusion still trains whole."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ScaleSettings:
    """How a step is laid over the machine; none of it changes what is learned, but for rounding.

    dtype        of the computation; master weights, moments and reductions are fp32. "auto": bfloat16 on a GPU
    checkpoint   recompute activations of each block in the backward pass
    compile      torch.compile each block
    shard        FSDP2 over all processes; without it every process holds all weights and gradients are summed
    """

    dtype: str = "auto"
    checkpoint: bool = False
    compile: bool = False
    shard: bool = True


@dataclass(frozen=True)
class Settings:
    """What both stages share.

    model            folder to start from
    out              folder of the run: step-N/ (to resume), log.jsonl, model/ (the result)
    steps, epochs    how long; one of the two
    max_length       positions of a packed row; a conversation that is longer is cut, or a bad row
    train            parts that learn; the encoders never do
    save_every       steps between checkpoints, of which `keep` stay
    eval_every       steps between evaluations on `eval_data` (`eval_rows` of each)
    report           "tensorboard", "wandb" or nothing; log.jsonl is always written
    workers          processes that read data; 0: none
    picture_size     side of the padded square in pixels: other views than the model folder's
    """

    model: str
    out: str
    optimizer: OptimizerSettings
    seed: int = 0
    steps: int | None = None
    epochs: float | None = None
    max_length: int = 3072
    train: tuple[str, ...] = ("language_model", "fusion")
    quantize: str | None = None
    lora: LoraSettings | None = None
    scale: ScaleSettings = ScaleSettings()
    device: str | None = None
    save_every: int = 1000
    keep: int = 2
    eval_every: int = 0
    eval_data: tuple[DataSettings, ...] = ()
    eval_rows: int = 256
    report: str | None = "tensorboard"
    workers: int = 2
    picture_size: int | None = None
    transform: str = "padded_resize"
    max_pixels: int = 16_000_000


@dataclass(frozen=True)
class Stage1(Settings):
    """Pre-training: `pairs` image-caption pairs and `text_tokens` packed text tokens in every step, no prompts.

    The two mean losses are weighted and added. The picture is seen as one global view.
    """

    optimizer: OptimizerSettings = OptimizerSettings(rate=5e-5, min_rate=5e-6, warmup_steps=2000)
    steps: int | None = 180_000
    data: tuple[DataSettings, ...] = ()
    text: tuple[str, ...] = ()
    text_column: str | None = None
    pairs: int = 640
    text_tokens: int = 65_536
    text_length: int = 2048
    caption_weight: float = 1.0
    text_weight: float = 1.0


@dataclass(frozen=True)
class Stage2(Settings):
    """Fine-tuning on conversations of all tasks: `batch` of them in every step, loss on answers only.

    independent_turns    the questions about a picture do not see each other; what stands before them is computed once
    coordinate_softness  standard deviation of a coordinate's label; needs a tokenizer in which 0.37 is one piece
    pointer_weight       of the loss that asks two heads to look at what an answer is about (docs/mini.md)
    """

    optimizer: OptimizerSettings = OptimizerSettings(rate=2e-5, min_rate=0.0, warmup_epochs=0.03)
    epochs: float | None = 1.0
    data: tuple[DataSettings, ...] = ()
    batch: int = 128
    independent_turns: bool = False
    coordinate_softness: float = 0.0
    pointer_weight: float = 0.0


STAGES: dict[str, type[Settings]] = {"stage1": Stage1, "stage2": Stage2}
PRESETS: dict[str, dict[str, Any]] = {  # of the optimizer
    "paper": {},
    "released": {"weight_decay": 0.0},  # LLaMA2-Accessory's published fine-tuning script
}
RIVALS = {"steps": "epochs", "warmup_steps": "warmup_epochs"}  # give one


def read_settings(stage: str, path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """The settings of `stage` from a YAML file, then `key=value` overrides, `preset` below both.

    Raises:
        ValueError: one line: not YAML, an unknown key (with the nearest known one), a value of another type, or values
            that contradict each other. Nothing has run by then.
    """
    try:
        import yaml
    except ImportError as error:
        raise ValueError('training needs more packages: pip install "sphinx-fast[train]"') from error
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a table of settings")
    named = {override.partition("=")[0] for override in overrides}
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign:
            raise ValueError(f"{override!r}: expected key=value")
        try:
            _place(content, key.split("."), yaml.safe_load(text), key)
            _drop_rival(content, key, named)
        except yaml.YAMLError as error:
            raise ValueError(f"{override!r}: not a YAML value") from error
    return make_settings(stage, content, str(path))


def make_settings(stage: str, content: Mapping[str, Any], where: str = "settings") -> Settings:
    """As `read_settings`, from a mapping."""
    if stage not in STAGES:
        raise ValueError(f"unknown stage {stage!r}; there are {', '.join(STAGES)}")
    content = dict(content)
    name = content.pop("preset", "paper")
    if name not in PRESETS:
        raise ValueError(f"{where}: preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    cls = STAGES[stage]
    defaults: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(cls)}
    given = _table(content.get("optimizer") or {}, where, "optimizer")
    base = {**dataclasses.asdict(defaults["optimizer"]), **PRESETS[name]}
    if given.keys() & {"warmup_steps", "warmup_epochs"}:
        base |= {"warmup_steps": None, "warmup_epochs": None}
    content["optimizer"] = {**base, **given}
    if "steps" in content and content["steps"] is not None and "epochs" not in content:
        content["epochs"] = None
    if "epochs" in content and content["epochs"] is not None and "steps" not in content:
        content["steps"] = None
    settings = _build(cls, content, where, "")
    _check(settings, where)
    return settings


def _table(value: Any, where: str, key: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: {key}: expected a table, got {value!r}")
    return dict(value)


def _place(content: Any, keys: list[str], value: Any, name: str) -> None:
    """Set content[a][b] = value; list entries by number."""
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(content, list):
            if not key.isdecimal() or int(key) >= len(content):
                raise ValueError(f"{name}: there are {len(content)} entries, none is number {key}")
            if last:
                content[int(key)] = value
            else:
                content = content[int(key)]
        elif isinstance(content, dict):
            if last:
                content[key] = value
            else:
                content = content.setdefault(key, {})
        else:
            raise ValueError(f"{name}: {'.'.join(keys[:depth])} is a value, not a table")


def _drop_rival(content: dict[str, Any], key: str, named: set[str]) -> None:
    """steps=9 on the command line takes the place of the file's epochs."""
    *groups, name = key.split(".")
    rival = {**RIVALS, **{b: a for a, b in RIVALS.items()}}.get(name)
    if rival is None or ".".join([*groups, rival]) in named:
        return
    table: Any = content
    for group in groups:
        table = table[group]
    table.pop(rival, None)


def _build(cls: type[T], content: Any, where: str, key: str) -> T:
    """A dataclass from a mapping, recursively; every key and every type is checked."""
    values = {}
    hints = typing.get_type_hints(cls)
    prefix = f"{key}." if key else ""
    for name, value in _table(content, where, key or cls.__name__).items():
        if name not in hints:
            near = difflib.get_close_matches(str(name), list(hints), 1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; known: {', '.join(sorted(hints))}"
            raise ValueError(f"{where}: unknown key {prefix}{name}{hint}")
        values[name] = _convert(hints[name], value, where, f"{prefix}{name}")
    missing = [
        f.name
        for f in dataclasses.fields(cls)  # type: ignore[arg-type]
        if f.name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{where}: {prefix}{missing[0]} is missing")
    return cls(**values)


def _convert(hint: Any, value: Any, where: str, key: str) -> Any:
    """`value` as the annotated type. YAML reads 5e-5 as text: a text that is a number is one, where one is wanted."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in inner:
            return None
        return _convert(next(kind for kind in inner if kind is not type(None)), value, where, key)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where, key)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            value = [value]
        if inner[-1] is not Ellipsis and len(value) != len(inner):
            raise ValueError(f"{where}: {key}: expected {len(inner)} values, got {len(value)}")
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
        return tuple(
            _convert(kind, v, where, f"{key}.{i}") for i, (kind, v) in enumerate(zip(kinds, value, strict=True))
        )
    if origin is dict:
        return _table(value, where, key)
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ValueError(f"{where}: {key}: expected {hint.__name__}, got {value!r}")


PARTS = ("language_model", "fusion")


def _check(settings: Settings, where: str) -> None:
    """What no type can say."""

    def need(truth: bool, message: str) -> None:
        if not truth:
            raise ValueError(f"{where}: {message}")

    optimizer = settings.optimizer
    need((settings.steps is None) != (settings.epochs is None), "give steps or epochs, one of them")
    need(settings.steps is None or settings.steps > 0, "steps: expected more than 0")
    need(settings.epochs is None or 0 < settings.epochs < math.inf, "epochs: expected more than 0")
    need((optimizer.warmup_steps or 0) >= 0 and (optimizer.warmup_epochs or 0.0) >= 0, "optimizer: warm-up below 0")
    need(optimizer.warmup_steps is None or optimizer.warmup_epochs is None, "optimizer: warm-up in steps or in epochs")
    need(0 <= optimizer.min_rate <= optimizer.rate, "optimizer: expected 0 <= min_rate <= rate")
    need(optimizer.clip > 0, "optimizer.clip: expected more than 0")
    need(bool(settings.train) and set(settings.train) <= set(PARTS), f"train: expected some of {', '.join(PARTS)}")
    need(settings.max_length >= 16, "max_length: expected at least 16")
    need(settings.keep >= 1 and settings.save_every >= 1, "keep and save_every: expected at least 1")
    need(settings.quantize is None or settings.lora is not None, "quantize: quantised weights do not train; add lora")
    need(settings.quantize != "int4", "quantize: int4 weights have no gradient; nf4 and int8 have")
    need(settings.report in (None, "tensorboard", "wandb"), "report: expected tensorboard, wandb or nothing")
    sources = typing.cast(Any, settings).data
    need(all(0 < source.ratio < math.inf for source in sources), "data: ratio: expected more than 0")
    need(settings.lora is None or "language_model" in settings.train, "lora: the language model does not learn")
    need(settings.transform in TRANSFORMS, f"transform: expected one of {', '.join(TRANSFORMS)}")
    need(settings.eval_rows >= 1 and settings.workers >= 0, "eval_rows and workers: expected at least 1 and 0")
    if isinstance(settings, Stage1):
        need(min(settings.pairs, settings.text_tokens) >= 0, "pairs and text_tokens: expected at least 0")
        need(settings.pairs > 0 or settings.text_tokens > 0, "pairs and text_tokens: one must be more than 0")
        need(settings.text_length >= 1, "text_length: expected at least 1")
        need(bool(sources) == (settings.pairs > 0), "data and pairs: both or neither")
        need(bool(settings.text) == (settings.text_tokens > 0), "text and text_tokens: both or neither")
        need(settings.text_tokens % settings.text_length == 0, "text_tokens: expected a multiple of text_length")
        need(settings.text_length <= settings.max_length, "text_length: expected at most max_length")
        need(settings.pairs > 0 or settings.epochs is None, "epochs are of pairs: give steps")
    if isinstance(settings, Stage2):
        need(
            not settings.pointer_weight or not settings.scale.checkpoint,
            "pointer_weight: not with scale.checkpoint, which computes attention twice",
        )
        need(bool(sources), "data: at least one data set is needed")
        need(settings.batch >= 1, "batch: expected at least 1")
