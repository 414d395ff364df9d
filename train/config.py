"""The training configuration: one frozen class per YAML section.

The string below each key says its meaning, unit, range and why it has this default. An example file
is ``configs/training_config.yaml``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, field_validator, model_validator

from shared.config import Section, apply_overrides, make_section, read_yaml
from shared.errors import ConfigError
from shared.storage import Store, parse_location, redact_url
from train.walkthrough import STREAM_OF_HEAD

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def _parse_folder_or_url(value: object) -> Path | str:
    """Return a local folder as a path, and a URL as it is written."""
    if not isinstance(value, str | Path):
        raise ValueError(f"{value!r} is neither a folder nor a URL")
    location = parse_location(value)
    if not isinstance(location, Store):
        return location
    if redact_url(location.url) != location.url:
        raise ValueError(
            f"{location} has a password in it, which would be written to checkpoints and logs; "
            "fix: put it into ~/.netrc or the environment"
        )
    return location.url


FolderOrUrl = Annotated[Path | str, BeforeValidator(_parse_folder_or_url)]
"""A folder, or the URL of one."""


class MixedSet(Section):
    """One shard set of a mix."""

    shards: FolderOrUrl
    """A shard set, as `data.shards`."""
    weight: float = Field(1.0, gt=0)
    """Weight of the set, above 0. Its share of the samples is its weight divided by the sum of all
    weights, so equal defaults mean equal shares."""
    name: str | None = Field(None, pattern=r"^[\w.-]+$")
    """Name in TensorBoard and in checkpoints: letters, digits, `_`, `.` and `-`. null means the
    last component of `shards`."""

    @property
    def title(self) -> str:
        """The set's name; "" if neither `name` nor `shards` gives one."""
        location = str(self.shards)
        path = urlsplit(location).path if "://" in location else location
        return self.name or re.sub(r"[^\w.-]", "-", path.rstrip("/").rpartition("/")[2])


class WindowConfig(Section):
    """What the model sees at once; changing it rebuilds nothing."""

    duration_s: float = Field(4.0, gt=0, le=3600)
    """Length of a window in seconds. It and the stride are multiples of the shortest time with
    whole samples of every stream that is read and whole ticks: 0.2 s for the default recipe."""
    stride_s: float | None = Field(None, gt=0, le=3600)
    """Seconds between the starts of windows; null means the duration, so that windows touch. A
    smaller stride gives more, overlapping samples; a larger one is refused. Held-out windows always
    touch."""

    @model_validator(mode="after")
    def _check_stride(self) -> WindowConfig:
        if self.stride > self.duration_s:
            raise ValueError(
                f"stride_s {self.stride:g} exceeds duration_s {self.duration_s:g}, so that nothing "
                "would be learned from the time between two windows; fix: set stride_s to at most "
                f"{self.duration_s:g}"
            )
        return self

    @property
    def stride(self) -> float:
        """Seconds between the starts of windows."""
        return self.duration_s if self.stride_s is None else self.stride_s


class DataConfig(Section):
    """Where samples come from and how they are batched."""

    shards: FolderOrUrl | None = None
    """A shard set that `python -m preprocess shards` built; the fast way to read data. A folder, or
    a URL such as s3://bucket/set or https://host/set (anything that fsspec opens). A URL is read
    through a cache on this machine."""
    mix: tuple[MixedSet, ...] | None = None
    """Several shard sets instead of `shards`. Each batch has samples of them by weight. Each set
    has its own epochs, so a small set with a large weight is repeated more often. The held-out
    sessions are those of all sets."""
    cache_dir: Path | None = None
    """Folder for copies of sets behind URLs; use a local disk. All runs on this machine share it.
    null means vr-creature/shards under $XDG_CACHE_HOME or ~/.cache, and for a user without a home
    folder one under $TMPDIR."""
    cache_gb: float = Field(64, gt=0)
    """Largest size of the cache in gigabytes (10^9 bytes); copies used longest ago are evicted
    first. A run needs space for two shuffle blocks of each set: 17 GB with 32 shards of 256 MiB. A
    set that fits completely is downloaded only once; the default holds about 100 hours."""
    root_dir: Path | None = None
    """Folder of session folders. Without `shards` and `mix`, sessions are read directly, which is
    slower and suits small data. With shards, it is only named in messages and commands."""
    recipe: Path | None = None
    """The recipe that divides sessions of `root_dir` into samples; null means the default recipe.
    Shards contain their recipe."""
    batch_size: int = Field(8, ge=1)
    """Samples per global batch; torchrun's ranks share it equally. A run can be resumed with a
    divisor of this batch size if accumulation_steps grows by the same factor."""
    window: WindowConfig = WindowConfig()
    """Length and spacing of the windows that samples are."""
    modalities: tuple[str, ...] | None = Field(None, min_length=1)
    """Names of the streams that are the model's inputs. null means all declared streams, or only
    the trained text streams if nothing but text is trained."""
    pixels: Literal["yuv420", "rgb"] = "yuv420"
    """Form of frames in a batch. yuv420: planes, which take half the bytes of RGB and are converted
    on the training device. rgb: RGB, converted by the loader; on a training device that is a CPU it
    saves 0.2 ms per frame of 224 pixels. The model's inputs differ by rounding only, except for
    videos whose stream has `codec: raw`, whose RGB frames yuv420 converts to planes and back."""
    num_workers: int = Field(2, ge=0)
    """Number of loader processes; 0 reads in the training process. It never changes which samples
    are in a batch. `python -m train profile` measures a good value."""
    prefetch_batches: int = Field(2, ge=1)
    """Batches that each loader process prepares in advance."""
    shuffle_block_shards: int = Field(32, ge=1)
    """Number of shards whose samples are shuffled together. More shards shuffle better; fewer keep
    fewer files open and, for remote sets, need less space and prefetching. With 32 shards of
    256 MiB and sessions of 10 minutes, a batch of 32 has 0.85 of the sessions that a full shuffle
    gives it (16 shards: 0.72, 64: 0.92), by tests/benchmarks/bench_shuffle.py."""
    last_batch: Literal["pad", "drop"] = "pad"
    """An epoch's incomplete last batch is padded with samples of weight 0, or dropped. A mix has no
    such batch, because its sets restart within batches."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Largest share of corrupt samples among those read; more stop the run. Corrupt samples are
    substituted by other samples, and reported."""

    @model_validator(mode="after")
    def _check_sets(self) -> DataConfig:
        if self.mix is not None:
            if self.shards is not None:
                raise ValueError(
                    "data.shards and data.mix both name shard sets; fix: remove one of them"
                )
            if not self.mix:
                raise ValueError("data.mix names no set; fix: remove it, or name a set")
            titles = [each.title for each in self.mix]
            for title in titles:
                if not title or titles.count(title) > 1:
                    fault = f"two sets called {title!r}" if title else "a set without a name"
                    raise ValueError(f"data.mix has {fault}; fix: give each set a name of its own")
        return self

    @property
    def sets(self) -> dict[str, Path | str]:
        """The shard sets, by the key that names each."""
        if self.mix is not None:
            return {f"mix[{i}].shards": each.shards for i, each in enumerate(self.mix)}
        return {} if self.shards is None else {"shards": self.shards}

    @property
    def source_description(self) -> str:
        """The folders and URLs that samples come from, for messages."""
        return ", ".join(str(location) for location in self.sets.values()) or str(self.root_dir)


_Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    """AdamW (Loshchilov & Hutter 2019)."""

    lr: float = Field(3e-4, gt=0)
    """Peak learning rate, above 0."""
    betas: tuple[_Decay, _Decay] = (0.9, 0.95)
    """Decay rates of the running means of the gradient and of its square, in [0, 1). Language
    models are usually trained with these."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the mean square, so that the division by it stays finite."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay; it applies to matrices, not to biases, norms or scales."""
    warmup_steps: int = Field(100, ge=0)
    """Steps in which the learning rate rises linearly from 0 to `lr`."""
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """Share of `lr` at which the cosine schedule ends, at `max_steps`."""


class CheckpointConfig(Section):
    """Where checkpoints are saved and how many are kept."""

    save_dir: Path = Path("checkpoints")
    """Folder of model_step_N.pt and model_final.pt. A new run refuses to start in a folder that
    holds another run's checkpoints."""
    keep_last_n: int = Field(3, ge=1)
    """Number of newest step checkpoints that are kept; older ones are removed."""


class TrainingConfig(Section):
    """The training loop."""

    max_steps: int = Field(100_000, ge=1)
    """Optimizer steps of the whole run."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Decides initial weights, dropout and the order of samples."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; auto is cuda if there is a GPU, else cpu."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """How torchrun's ranks share the model. ddp: each rank holds the whole model. fsdp (FSDP2):
    each holds a shard, for models that do not fit one GPU. auto is ddp. It changes results by
    rounding only."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the forward pass; auto is bf16 on a GPU that has it, else fp32."""
    compile: bool = False
    """Whether to compile the model by torch.compile: the start takes minutes, steps are faster."""
    num_threads: int | None = Field(None, ge=1)
    """CPU threads of the trainer; null uses the cores that loader processes and other ranks do not
    need."""
    accumulation_steps: int = Field(1, ge=1)
    """Number of micro-batches of batch_size samples per optimizer step."""
    grad_clip: float = Field(1.0, gt=0)
    """Largest norm of the whole gradient; a larger gradient is scaled down to it."""
    spike_sigma: float | None = Field(6.0, gt=0)
    """Steps whose loss or gradient norm is a spike are skipped. A spike's logarithm exceeds the
    mean of the newest 128 steps by more than this many standard deviations; besides, a loss exceeds
    their mean by a quarter, a norm is twice theirs. null skips no finite step."""
    log_interval: int = Field(100, ge=1)
    """Steps between log lines."""
    eval_interval: int = Field(1000, ge=1)
    """Steps between evaluations on held-out sessions."""
    eval_batches: int = Field(20, ge=1)
    """Largest number of held-out batches per evaluation."""
    save_interval: int = Field(1000, ge=1)
    """Steps between checkpoints."""
    log_dir: Path = Path("runs")
    """Folder of TensorBoard logs; each run has a folder in it."""
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpointing: CheckpointConfig = CheckpointConfig()
    loss_weights: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Weight of each head's loss in loss_total: {NAME: weight}, with the name of any declared
    audio, sensor or text stream. 0 switches the head off and, if nothing else needs its stream, the
    stream is not read. internal_text, external_text, audio and animation (the head of proprio) have
    weight 1 where they are left out and the data declares them; all others have 0."""

    @field_validator("loss_weights")
    @classmethod
    def _check_loss_weights(cls, weights: dict[str, float]) -> dict[str, float]:
        for head, stream in STREAM_OF_HEAD.items():
            if head in weights and stream in weights:
                raise ValueError(
                    f"both {head} and {stream} are set, which are one head; fix: remove one of them"
                )
        return weights


class ModelConfig(Section):
    """Size of the MultiModalCreature."""

    size: Literal["tiny", "small", "medium", "large"] | None = None
    """About 10M, 100M, 500M or 1B parameters. It sets hidden_dim, num_layers and num_heads; one of
    these next to it overrides that one. On the command line it replaces those in the file."""
    hidden_dim: int | None = Field(None, ge=16, multiple_of=8)
    """Width of the model, a multiple of 8; 512 if neither it nor size is set."""
    num_layers: int | None = Field(None, ge=1)
    """Number of layers of the backbone; 6 if neither it nor size is set."""
    num_heads: int | None = Field(None, ge=1)
    """Number of attention heads; null means one per 64 of width."""
    vision_layers: int = Field(2, ge=0)
    """Number of layers of the frame encoder."""
    patch_size: int = Field(16, ge=2)
    """Side of a frame's patches in pixels; must divide height and width of every video."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of activations dropped in training, in [0, 1)."""
    modality_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of samples from which a modality is hidden in training, in [0, 1); each modality
    independently, all videos as one. The model then learns to work without it, which takes more
    steps. It does not apply if text is the only input."""
    tick_rate_hz: float = Field(10.0, gt=0)
    """Model time steps per second; a segment must hold a whole number of them."""
    pad_weight: float = Field(0.1, ge=0, le=1)
    """Weight of a silent tick in the text losses, where a token has weight 1. Most ticks are
    silent, and would otherwise outweigh the tokens."""
    gradient_checkpointing: bool | None = None
    """Whether to recompute the activations of all layers, of backbone and frame encoder, in the
    backward pass, which saves memory and costs time. null means only for size large."""

    @model_validator(mode="after")
    def _check_size(self) -> ModelConfig:
        if self.size is not None and self.hidden_dim is not None and self.num_layers is not None:
            raise ValueError(
                f"model.size {self.size} has no effect together with hidden_dim {self.hidden_dim} "
                f"and num_layers {self.num_layers}; fix: remove size, or one of the two"
            )
        return self

    @property
    def is_checkpointing(self) -> bool:
        """Whether layers recompute their activations in the backward pass."""
        if self.gradient_checkpointing is None:
            return self.size == "large"
        return self.gradient_checkpointing


class TrainConfig(Section):
    """A whole training configuration file."""

    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    model: ModelConfig = ModelConfig()


def load_train_config(
    path: Path, overrides: Sequence[str] = (), *, warn: Callable[[str], object] = lambda _: None
) -> TrainConfig:
    """Read a configuration file and apply ``key.sub=value`` overrides.

    Overrides of the model's size replace the file's other keys about its size.

    `warn`: called with a message for each key of the file that has no effect any more.

    Raises:
        ConfigError: the file or an override cannot be used.
    """
    values, override_values = read_yaml(path), apply_overrides({}, overrides)
    model = values.get("model")
    if isinstance(model, dict):
        superseded = _superseded_keys(model, override_values.get("model"))
        values["model"] = {key: value for key, value in model.items() if key not in superseded}
        for key in superseded:
            warn(f"{path}: model.{key} {model[key]} is replaced by the size on the command line")
    values = apply_overrides(values, overrides)
    return make_section(TrainConfig, values, origin=str(path), overrides=overrides)


def _superseded_keys(model: Mapping[str, Any], override: object) -> list[str]:
    """Return the size keys of a file's model section that overrides of the size replace."""
    override = override if isinstance(override, dict) else {}
    keys: tuple[str, ...] = ()
    if override.get("size") is not None:
        keys = ("hidden_dim", "num_layers", "num_heads")
    elif override.get("hidden_dim") is not None and override.get("num_layers") is not None:
        keys = ("size",)
    return [key for key in keys if model.get(key) is not None and key not in override]


def as_train_config(config: object) -> TrainConfig:
    """Validate a configuration, given as a TrainConfig or as the dict of ``yaml.safe_load``.

    Raises:
        ConfigError: it is neither, or has a wrong key or value.
    """
    if isinstance(config, TrainConfig):
        return config
    if not isinstance(config, Mapping):
        raise ConfigError(
            f"the configuration is {str(config)[:80]!r}, a {type(config).__name__}; fix: give a "
            "TrainConfig or a dict, such as yaml.safe_load(open(FILE)) returns"
        )
    return make_section(TrainConfig, config)
