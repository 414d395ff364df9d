"""When corrupt samples, each of which another one stood in for, are too many to go on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from shared.errors import TooManyCorruptSamplesError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MIN_SAMPLES_JUDGED: Final = 200
"""The share of corrupt samples is judged after so many samples."""


@dataclass(slots=True, kw_only=True)
class CorruptSampleBudget:
    """Counts corrupt samples against ``data.max_bad_fraction`` of those read.

    A loader counts its own; where ranks share the batches the trainer counts those of all, so that
    a run stops or goes on whatever its number of ranks.
    """

    max_fraction: float
    num_read: int = 0
    num_bad: int = 0

    def count(self, num_read: int, skipped: Sequence[Mapping[str, Any]]) -> None:
        """Add one batch: how many samples it has, and the corrupt ones, each with its "error".

        Raises:
            TooManyCorruptSamplesError: the share is too large.
        """
        self.num_read += num_read
        self.num_bad += len(skipped)
        if not skipped or self.num_bad <= self.max_fraction * max(
            self.num_read, MIN_SAMPLES_JUDGED
        ):
            return
        raise TooManyCorruptSamplesError(
            f"{self.num_bad} of {self.num_read} samples are corrupt, data.max_bad_fraction allows "
            f"{self.max_fraction:g}; run `python -m preprocess verify SHARDS`; the last: "
            f"{skipped[-1]['error']}"
        )
