"""Describe the columns of a shard: the file of each stream, and the form of its values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shared.streams import Kind, StreamSpec

MAX_MEMBER_BYTES = 1 << 30
"""A larger member of any column is refused without reading it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """The file of a shard that holds a stream, or the dMel tokens of an audio stream."""

    name: str
    """The stream's name, or ``NAME.dmel``."""
    stream: str
    kind: Kind
    """Kind of the stream."""
    codec: str
    """Extension of the members of a tar column; "zarr" for an array."""
    dtype: str
    """Of the decoded values of one segment; "json" for text."""
    shape: tuple[int, ...]
    """Of the decoded values of one segment; () for text."""
    unit: str
    max_bytes: int
    """Largest size of a member: exact if the recipe decides it, else far above the need."""
    settings: Mapping[str, Any]
    """Settings of the stream that the bytes depend on."""
    dimensions: tuple[str, ...] = ()
    """Names of the dimensions of a Zarr array, the segments' first."""
    fill_value: float | str = 0
    """Fill value of a Zarr array in its JSON form: marks values that are missing."""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """Attributes of a Zarr array."""
    has_time_errors: bool = False
    """Whether the index holds ``NAME.error_s``, the time error of each frame."""
    uses_tokenizer: bool = False
    """Whether the bytes depend on the tokenizer."""
    is_training_input: bool = True
    """Whether training reads this column of the stream."""
    code_version: int = 1
    """Must be raised when the code gives other bytes for the same input."""

    @property
    def container(self) -> Literal["tar", "zarr"]:
        """Form of the file."""
        return "zarr" if self.codec == "zarr" else "tar"

    @property
    def suffix(self) -> str:
        """Suffix of the file name."""
        return "zarr.zip" if self.codec == "zarr" else "tar"

    @property
    def array(self) -> str:
        """Name of the array of a Zarr column."""
        return self.name.rpartition(".")[2]

    def member_name(self, key: str) -> str:
        """Return a segment's member name, such as ``session_001/000004.audio.wav``."""
        return f"{key}.{self.name}.{self.codec}"

    def schema(self) -> dict[str, Any]:
        """Describe the column for the manifest."""
        return {
            "stream": self.stream,
            "kind": self.kind.value,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "unit": self.unit,
            "codec": self.codec,
        }


def stream_settings(spec: StreamSpec, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the settings of a stream that decide its bytes, as flat JSON values.

    What is masked and how channels are mixed is part of the scan, and so of each session's rows.
    """
    passive = ("required", "expect", "mask", "channels", *without)
    return {key: value for key, value in spec.as_json().items() if key not in passive}
