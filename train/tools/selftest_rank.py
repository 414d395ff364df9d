"""One rank of ``train selftest``: the real loader and trainer, and a record of what was read.

python -m train.tools.selftest_rank JOB.json     in torchrun's environment
"""

from __future__ import annotations

import json
import sys
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from rich.console import Console

from train.config import TrainConfig
from train.data.loader import Loader, open_source
from train.loop.trainer import Trainer
from train.machine import distributed
from train.model.multimodal import MultiModalCreature

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from train.data.batch import Batch

HOLD_S: Final = 600.0
"""Nobody is left waiting longer for a kill that does not come."""

Sample = tuple[str, int, bool]
"""Key, CRC-32 of what it gives the model, and whether it counts (False: padding)."""


class RecordedLoader:
    """A loader that writes down what it gives, before the trainer gets it.

    Args:
        loader: the real one.
        path: a line of JSON per batch.
        hold_after: so many batches later it waits to be killed.
    """

    def __init__(self, loader: Loader, path: Path, *, hold_after: int) -> None:
        self.source, self.rank, self.world_size = loader.source, loader.rank, loader.world_size
        self._loader = loader
        self._path = path
        self._hold_after = hold_after

    def state_at(self, next_batch: int) -> dict[str, Any]:
        """See :class:`train.data.loader.Loader`."""
        return self._loader.state_at(next_batch)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :class:`train.data.loader.Loader`."""
        self._loader.load_state_dict(state)

    def __iter__(self) -> Iterator[Batch]:
        began_s = time.perf_counter()
        with self._path.open("w", encoding="utf-8") as file:
            for number, batch in enumerate(self._loader):
                if number == self._hold_after:
                    _hold()
                after_s = time.perf_counter() - began_s
                file.write(json.dumps({"after_s": after_s, "samples": samples_of(batch)}) + "\n")
                file.flush()
                yield batch


def _hold() -> None:
    """Wait to be killed; or to find, as in a step, that another rank is gone."""
    deadline_s = time.monotonic() + HOLD_S
    while time.monotonic() < deadline_s:
        distributed.any_of(False)
        time.sleep(0.02)


def samples_of(batch: Batch) -> list[Sample]:
    """What each row of a batch is; padding of dense text, which depends on the rank, is left
    out.
    """
    checksums = [0] * len(batch["keys"])
    for name, tensor in sorted(batch["inputs"].items()):
        if name.endswith("_valid"):
            continue
        valid = batch["inputs"][f"{name}_valid"]
        for row, checksum in enumerate(checksums):
            content = tensor[row][valid[row]].numpy().tobytes()
            checksums[row] = zlib.crc32(content, checksum)
    counts = (weight > 0 for weight in batch["weight"].tolist())
    return list(zip(batch["keys"], checksums, counts, strict=True))


def train_part(job: Mapping[str, Any]) -> None:
    """One rank of one part."""
    config, out = TrainConfig.model_validate(job["config"]), Path(job["out"])
    with distributed.process_group(torch.device("cpu")):
        rank, world_size = distributed.rank(), distributed.world_size()
        source = open_source(config, split="train")
        loader = Loader(source, config, rank=rank, world_size=world_size)
        path = out / f"record_{rank}.jsonl"
        recorded = RecordedLoader(loader, path, hold_after=job["hold_after"])
        torch.manual_seed(config.training.seed)
        model = MultiModalCreature(config, loader.shapes)
        trainer = Trainer(model, config, recorded, run_name="selftest", console=Console(quiet=True))
        if job["resume"] is None:
            recorded.load_state_dict(recorded.state_at(job["start"]))
        else:
            trainer.load_checkpoint(job["resume"])
        trainer.train()


def main(arguments: Sequence[str]) -> None:
    """A rank of a part, as :data:`train.tools.selftest.PROGRAM` starts it."""
    train_part(json.loads(Path(arguments[0]).read_text(encoding="utf-8")))


if __name__ == "__main__":
    main(sys.argv[1:])
