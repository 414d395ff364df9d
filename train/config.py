"""The training configuration: one frozen class per YAML section; see
``configs/training_config.yaml``.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, model_validator

from shared.config import Section, apply_overrides, make_section, read_yaml
from shared.errors import ConfigError
from shared.recipe import STREAMS, TEXT_STREAMS, Stream
from shared.storage import Store, parse_location, redact_url

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Head(enum.StrEnum):
    """What the model predicts; each has its loss, ``loss_<head>``."""

    INTERNAL_TEXT = "internal_text"
    EXTERNAL_TEXT = "external_text"
    AUDIO = "audio"
    ANIMATION = "animation"


HEAD_STREAM: Mapping[Head, Stream] = {
    Head.INTERNAL_TEXT: Stream.INTERNAL_TEXT,
    Head.EXTERNAL_TEXT: Stream.EXTERNAL_TEXT,
    Head.AUDIO: Stream.AUDIO,
    Head.ANIMATION: Stream.PROPRIO,
}
"""The stream whose next tick each head predicts."""


def _as_place(value: object) -> Path | str:
    """A local path as a path; a URL stays as it is written."""
    if not isinstance(value, str | Path):
        raise ValueError(f"{value!r} is neither a folder nor a URL")
    place = parse_location(value)
    if not isinstance(place, Store):
        return place
    if redact_url(place.url) != place.url:
        raise ValueError(
            f"{place}: checkpoints and logs hold the configuration, so no password may stand in "
            "it; put it into ~/.netrc or the environment"
        )
    return place.url


Place = Annotated[Path | str, BeforeValidator(_as_place)]
"""A folder, or the URL of one."""


class MixedSet(Section):
    """One shard set of a mix."""

    shards: Place
    """A shard set, as `data.shards`."""
    weight: float = Field(1.0, gt=0)
    """Its share of the samples is this, of the sum of all weights."""
    name: str | None = Field(None, pattern=r"^[\w.-]+$")
    """In TensorBoard and in checkpoints; null means the last part of `shards`."""

    @property
    def title(self) -> str:
        """Its name; "" where nothing gives one."""
        place = str(self.shards)
        path = urlsplit(place).path if "://" in place else place
        return self.name or re.sub(r"[^\w.-]", "-", path.rstrip("/").rpartition("/")[2])


class DataConfig(Section):
    """Where samples come from and how they are batched."""

    shards: Place | None = None
    """A shard set made by `python -m preprocess shards`; the fast way. A folder, or a URL such as
    s3://bucket/set or https://host/set (anything that fsspec opens), which is read through a cache
    on this machine."""
    mix: tuple[MixedSet, ...] | None = None
    """Instead of `shards`: several shard sets, of which each batch has samples by weight. Each set
    goes through epochs of its own, so a small set with a large weight is seen more often; held-out
    sessions are those of all sets."""
    cache_dir: Path | None = None
    """Folder for copies of sets behind URLs, shared by every run of this machine; on a local disk.
    null means vr-creature/shards under $XDG_CACHE_HOME or ~/.cache."""
    cache_gb: float = Field(64, gt=0)
    """So many gigabytes (10^9 bytes) of copies are kept; what was used longest ago goes first. A
    run needs room for two blocks (of each set of a mix): 17 GB with 32 shards of 256 MiB. A set
    that fits wholly, 100 hours or so here, is fetched only once."""
    root_dir: Path | None = None
    """A folder of session folders. Without `shards` and `mix` they are read directly, the
    small-data way."""
    recipe: Path | None = None
    """With root_dir: the recipe that cuts the sessions; null means the default recipe."""
    batch_size: int = Field(8, ge=1)
    """Samples per global batch, which the ranks of torchrun share equally. A run may go on with a
    divisor of it, and with accumulation_steps as much larger."""
    modalities: tuple[Stream, ...] | None = Field(None, min_length=1)
    """Streams that the model sees; null means all of them, or only text where only text is trained.
    """
    pixels: Literal["yuv420", "rgb"] = "yuv420"
    """Form of the frames in a batch: planes, half the bytes, which become RGB on the training
    device; or RGB. The numbers that the model sees differ by rounding at most, but for shards of
    `vision.codec: raw`, whose RGB becomes planes. Where the training device is a CPU, rgb costs it
    0.2 ms less per frame of 224 pixels."""
    num_workers: int = Field(2, ge=0)
    """Loader processes; 0 reads in the training process. Never changes which samples are in a
    batch."""
    prefetch_batches: int = Field(2, ge=1)
    """Batches each loader process keeps ready."""
    shuffle_block_shards: int = Field(32, ge=1)
    """Shards whose samples are mixed with each other; more mixes better, fewer keep fewer files
    open and, of remote sets, fetch less ahead. 32 shards of 256 MiB and sessions of 10 minutes give
    0.85 of the sessions that a full permutation puts into a batch of 32 (16: 0.72, 64: 0.92), by
    tests/benchmarks/bench_shuffle.py."""
    last_batch: Literal["pad", "drop"] = "pad"
    """What becomes of an epoch's incomplete last batch: filled up with samples of weight 0, or left
    out. A mix has no such batch: its sets begin anew within batches."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """More corrupt samples than this share of those read stop the run."""

    @model_validator(mode="after")
    def _one_way_to_name_sets(self) -> DataConfig:
        if self.mix is not None:
            if self.shards is not None:
                raise ValueError("data.shards and data.mix both name shard sets; leave one out")
            if not self.mix:
                raise ValueError("data.mix names no set; leave it out, or name one")
            titles = [each.title for each in self.mix]
            for title in titles:
                if not title or titles.count(title) > 1:
                    fault = f"two sets called {title!r}" if title else "a set without a name"
                    raise ValueError(f"data.mix has {fault}; give each a name of its own")
        return self

    @property
    def sets(self) -> dict[str, Path | str]:
        """The shard sets, by the key that names each."""
        if self.mix is not None:
            return {f"mix[{i}].shards": each.shards for i, each in enumerate(self.mix)}
        return {} if self.shards is None else {"shards": self.shards}

    @property
    def source_description(self) -> str:
        """Where samples come from, for messages."""
        return ", ".join(str(place) for place in self.sets.values()) or str(self.root_dir)


_Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    """AdamW (Loshchilov & Hutter 2019)."""

    lr: float = Field(3e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[_Decay, _Decay] = (0.9, 0.95)
    """Decay of the running means of the gradient and of its square."""
    eps: float = Field(1e-8, gt=0)
    """Keeps the division by the root of the running mean of squares finite."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled decay, on matrices only."""
    warmup_steps: int = Field(100, ge=0)
    """Steps over which the learning rate rises from 0."""
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """Share of the peak at which the cosine ends."""


class CheckpointConfig(Section):
    """Where checkpoints go and how many are kept."""

    save_dir: Path = Path("checkpoints")
    """Folder of model_step_N.pt and model_final.pt."""
    keep_last_n: int = Field(3, ge=1)
    """Older step checkpoints are removed."""


class LossWeights(Section):
    """Share of each loss in loss_total; 0 switches the head off and, where nothing else needs it,
    its stream.
    """

    internal_text: float = Field(1.0, ge=0)
    """Weight of the thought loss."""
    external_text: float = Field(1.0, ge=0)
    """Weight of the speech loss."""
    audio: float = Field(1.0, ge=0)
    """Weight of the sound loss."""
    animation: float = Field(1.0, ge=0)
    """Weight of the movement loss."""

    @model_validator(mode="after")
    def _something_is_learned(self) -> LossWeights:
        if not any(getattr(self, head) for head in Head):
            raise ValueError("all loss weights are 0; nothing would be learned, set one above 0")
        return self


class TrainingConfig(Section):
    """The optimizer loop."""

    max_steps: int = Field(100_000, ge=1)
    """Optimizer steps of the whole run."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Decides initial weights, dropout and the order of samples."""
    device: str = "auto"
    """auto takes cuda where there is one, else cpu."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """Under torchrun: ddp holds the whole model on every rank, fsdp (FSDP2) a share of it, for
    models that do not fit one GPU; auto is ddp. Never changes the numbers beyond rounding."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Numbers of the forward pass; auto takes bf16 on a GPU that has it, else fp32."""
    compile: bool = False
    """Compile the model by torch.compile; slower start, faster steps."""
    num_threads: int | None = Field(None, ge=1)
    """CPU threads of the trainer; null takes the cores that the loader processes leave over."""
    accumulation_steps: int = Field(1, ge=1)
    """Micro-batches of batch_size per optimizer step."""
    grad_clip: float = Field(1.0, gt=0)
    """Largest norm of the whole gradient."""
    spike_sigma: float | None = Field(6.0, gt=0)
    """A step whose loss or gradient norm is, in logarithms, so many standard deviations above those
    of the newest 128 steps, the loss at least a quarter above their mean and the norm twice it, is
    left out; null takes every finite step."""
    log_interval: int = Field(100, ge=1)
    """Steps between log lines."""
    eval_interval: int = Field(1000, ge=1)
    """Steps between measurements on held-out sessions."""
    eval_batches: int = Field(20, ge=1)
    """At most so many held-out batches per measurement."""
    save_interval: int = Field(1000, ge=1)
    """Steps between checkpoints."""
    log_dir: Path = Path("runs")
    """TensorBoard logs; one folder per run below it."""
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpointing: CheckpointConfig = CheckpointConfig()
    loss_weights: LossWeights = LossWeights()


class ModelConfig(Section):
    """Size of the MultiModalCreature."""

    size: Literal["tiny", "small", "medium", "large"] | None = None
    """About 10M, 100M, 500M or 1B parameters; sets hidden_dim, num_layers and num_heads. One of
    them beside it changes that one; on the command line it takes the place of those in the file."""
    hidden_dim: int | None = Field(None, ge=16, multiple_of=8)
    """Width; 512 where neither it nor size is given."""
    num_layers: int | None = Field(None, ge=1)
    """Depth of the backbone; 6 where neither it nor size is given."""
    num_heads: int | None = Field(None, ge=1)
    """Attention heads; null means one per 64 of width."""
    vision_layers: int = Field(2, ge=0)
    """Depth of the frame encoder."""
    patch_size: int = Field(16, ge=2)
    """Side of a frame patch in pixels; divides the recipe's vision.size."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of activations dropped while training."""
    modality_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of samples from which a modality (both eyes are one) is hidden while training, each by
    itself; so the model knows sessions that lack it, which takes more steps. Text alone has none.
    """
    tick_rate_hz: float = Field(10.0, gt=0)
    """Time steps per second; divides the recipe's mel.rate_hz and sensors.rate_hz."""
    pad_weight: float = Field(0.1, ge=0, le=1)
    """Weight of a silent tick in the text losses, where a token's is 1."""
    gradient_checkpointing: bool | None = None
    """Recompute the activations of all layers, of backbone and frames, in the backward pass to save
    memory; null means only for size large."""

    @model_validator(mode="after")
    def _size_says_something(self) -> ModelConfig:
        if self.size is not None and self.hidden_dim is not None and self.num_layers is not None:
            raise ValueError(
                f"model.size {self.size} says nothing beside hidden_dim {self.hidden_dim} and "
                f"num_layers {self.num_layers}; leave out either size, or one of them"
            )
        return self

    @property
    def is_checkpointing(self) -> bool:
        """Whether layers compute their activations again."""
        if self.gradient_checkpointing is None:
            return self.size == "large"
        return self.gradient_checkpointing


class TrainConfig(Section):
    """A whole training configuration file."""

    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    model: ModelConfig = ModelConfig()

    @property
    def heads(self) -> tuple[Head, ...]:
        """Heads whose loss counts."""
        return tuple(h for h in Head if getattr(self.training.loss_weights, h) > 0)

    @property
    def target_streams(self) -> tuple[Stream, ...]:
        """Streams that the active heads are compared with."""
        return tuple(HEAD_STREAM[h] for h in self.heads)

    @property
    def input_streams(self) -> tuple[Stream, ...]:
        """Streams that the model sees."""
        if self.data.modalities is not None:
            return tuple(s for s in STREAMS if s in self.data.modalities)
        if set(self.target_streams) <= set(TEXT_STREAMS):
            return self.target_streams
        return STREAMS

    @property
    def is_text_only(self) -> bool:
        """Whether nothing but text is read, so that batches are packed densely."""
        return {*self.input_streams, *self.target_streams} <= set(TEXT_STREAMS)


def load_train_config(
    path: Path, overrides: Sequence[str] = (), *, say: Callable[[str], object] | None = None
) -> TrainConfig:
    """Read a file with ``key.sub=value`` overrides on top, where the size of the model that is
    named last counts.

    Args:
        path: the file.
        overrides: laid over it.
        say: told which of the file's keys do not count any more.

    Raises:
        ConfigError: the file or an override can't be used.
    """
    values, given = read_yaml(path), apply_overrides({}, overrides)
    model = values.get("model")
    if isinstance(model, dict):
        over = _superseded(model, given.get("model"))
        values["model"] = {key: value for key, value in model.items() if key not in over}
        for key in over:
            if say is not None:
                say(f"{path}: model.{key} {model[key]} gives way to the command line's size")
    values = apply_overrides(values, overrides)
    return make_section(TrainConfig, values, origin=str(path), overrides=overrides)


def _superseded(model: Mapping[str, Any], given: object) -> list[str]:
    """Keys of a file's model that say what those given on the command line say anew."""
    given = given if isinstance(given, dict) else {}
    over: tuple[str, ...] = ()
    if given.get("size") is not None:
        over = ("hidden_dim", "num_layers", "num_heads")
    elif given.get("hidden_dim") is not None and given.get("num_layers") is not None:
        over = ("size",)
    return [key for key in over if model.get(key) is not None and key not in given]


def as_train_config(config: object) -> TrainConfig:
    """A validated configuration, from one or from plain values as ``yaml.safe_load`` gives them.

    Raises:
        ConfigError: it is neither of them, or has a wrong key or value.
    """
    if isinstance(config, TrainConfig):
        return config
    if not isinstance(config, Mapping):
        raise ConfigError(
            f"the configuration is {str(config)[:80]!r}, a {type(config).__name__}; give a "
            "TrainConfig or a dict, such as yaml.safe_load(open(FILE)) returns"
        )
    return make_section(TrainConfig, config)
