"""``train selftest``: a killed run goes on as if nothing had been; proved on the user's own data.

One run is left alone: one process, no loader processes. Another one is killed (SIGKILL) at random
steps and resumed from its newest checkpoint by other numbers of ranks and of loader processes. It
must have trained on the same samples in the same order, to the byte, and come to the same weights.

All of it is the real thing: the user's data and configuration, the loader, the trainer and its
checkpoints, in processes as torchrun starts them. Only the model is the smallest one, on the CPU,
so that it takes minutes. The runs begin shortly before the end of an epoch and cross it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from rich.console import Console

from shared.errors import ConfigError, EngineError
from train.checkpoints import FINAL_NAME, load_checkpoint, step_name
from train.config import ModelConfig, TrainConfig
from train.data.loader import Loader, open_source
from train.loop.checkpoint_manager import find_latest_checkpoint
from train.loop.trainer import Trainer
from train.machine import distributed
from train.model.multimodal import MultiModalCreature

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from train.data.batch import Batch


PROGRAM: Final = (sys.executable, "-m", "train.tools.selftest")
"""Starts one rank of a part; its argument is a job file."""

SAVE_INTERVAL: Final = 3
"""Steps between checkpoints of the self test."""

MIN_STEPS: Final = SAVE_INTERVAL + 1
"""Each part trains so many steps at least, so that each leaves a checkpoint of its own."""

MAX_WORLD_SIZE: Final = 4
MAX_PROCESSES: Final = 8
"""Ranks, and ranks with their loader processes, of a part."""

MAX_WEIGHT_DIFFERENCE: Final = 0.05
"""Of the way that the weights went. Another order of float32 sums made less than 0.0001; a step
taken twice or never, or moments lost, far more."""

END_TIMEOUT_S: Final = 60.0
"""When one rank is killed, the others must have ended after so long."""

POLL_S: Final = 0.005

HOLD_S: Final = 600.0
"""Nobody is left waiting longer for a kill that does not come."""

Sample = tuple[str, int, bool]
"""Key, CRC-32 of what it gives the model, and whether it counts (False: padding)."""

_GUARD_BATCHES: Final = 2
"""A part waits to be killed so many batches after its moment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One life of a run."""

    world_size: int
    num_workers: int
    kill_after: int | None
    """Batches of the whole run after which it is killed; None: it may end."""
    is_one_killed: bool = False
    """Whether only the last rank is killed; the others must end by themselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a part read."""

    first_step: int
    batches: Sequence[Sequence[Sample]]
    """Global batches, in order."""
    to_first_batch_s: float
    problem: str | None = None


def run_selftest(
    config: TrainConfig,
    *,
    num_kills: int = 2,
    num_steps: int = 40,
    seed: int = 0,
    program: Sequence[str] = PROGRAM,
    say: Callable[[str], None] = print,
) -> bool:
    """Compare a run that is killed with one that is not.

    Args:
        config: the user's; only its model, device and intervals are replaced.
        num_kills: how often the run is killed and resumed.
        num_steps: of both runs.
        seed: decides moments, ranks and loader processes.
        program: starts a rank, given a job file.
        say: takes a line for each part.

    Returns:
        Whether all is the same.

    Raises:
        EngineError: the configuration or the data can't be used, or the undisturbed run failed.
    """
    batches_per_step = config.training.accumulation_steps
    parts = plan_parts(
        num_kills=num_kills,
        num_steps=num_steps,
        batches_per_step=batches_per_step,
        batch_size=config.data.batch_size,
        seed=seed,
    )
    loader = Loader(open_source(config, split="train"), config)  # says at once what is wrong
    start = max(0, loader.batches_per_epoch - num_steps * batches_per_step // 2)
    say(
        f"{num_steps} steps of {batches_per_step} x {config.data.batch_size} samples, from batch "
        f"{start} on; an epoch has {loader.batches_per_epoch}"
    )
    with tempfile.TemporaryDirectory(prefix="selftest-") as name:
        alone, killed = (
            _Run(Path(name) / kind, config, num_steps, start, program)
            for kind in ("undisturbed", "killed")
        )
        whole = alone.live(Part(world_size=1, num_workers=0, kill_after=None), 0, seed=seed)
        if whole.problem is not None:
            raise EngineError(f"the undisturbed run failed: {whole.problem}")
        say(f"undisturbed: 1 rank, 0 loader processes: {len(whole.batches)} batches")
        is_same = _live_again(killed, parts, whole.batches, seed=seed, say=say)
        is_same = is_same and _has_same_weights(killed, alone, say)
    say("PASS: the killed run is the undisturbed one" if is_same else "FAIL: see above")
    return is_same


def plan_parts(
    *, num_kills: int, num_steps: int, batches_per_step: int, batch_size: int, seed: int
) -> list[Part]:
    """Lives of a run that is killed `num_kills` times, each unlike the one before.

    Raises:
        ConfigError: too few steps for so many kills.
    """
    least = (num_kills + 1) * MIN_STEPS
    if num_steps < least:
        raise ConfigError(f"{num_kills} kills need at least {least} steps; set --steps {least}")
    chance = random.Random(seed)  # noqa: S311 (no secret)
    extra = sorted(chance.randint(0, num_steps - least) for _ in range(num_kills))
    ways = [
        (world_size, num_workers)
        for world_size in range(1, MAX_WORLD_SIZE + 1)
        for num_workers in range(3)
        if batch_size % world_size == 0 and world_size * (1 + num_workers) <= MAX_PROCESSES
    ]
    world_sizes = {world_size for world_size, _ in ways}
    parts: list[Part] = []
    world_size, num_workers = 1, 0
    for number in range(num_kills + 1):
        other = [
            (w, n)
            for w, n in ways
            if n != num_workers and (w != world_size or len(world_sizes) == 1)
        ]
        world_size, num_workers = chance.choice(other)
        kill_after = None
        if number < num_kills:
            step = (number + 1) * MIN_STEPS + extra[number]
            kill_after = step * batches_per_step - chance.randrange(batches_per_step)
        parts.append(
            Part(
                world_size=world_size,
                num_workers=num_workers,
                kill_after=kill_after,
                is_one_killed=world_size > 1 and number % 2 == 1,
            )
        )
    return parts


def compare(
    batches: Sequence[Sequence[Sample]], expected: Sequence[Sequence[Sample]], *, first: int
) -> str | None:
    """What differs first between a part's batches and those from `first` on; None: nothing."""
    for number, batch in enumerate(batches, start=first):
        if number >= len(expected):
            return f"batch {number} is one too many"
        if batch != expected[number]:
            pairs = zip(batch, expected[number], strict=False)
            place = next((i for i, (one, other) in enumerate(pairs) if one != other), 0)
            found, wanted = batch[place : place + 1], expected[number][place : place + 1]
            return f"batch {number}, sample {place} is {found}, it should be {wanted}"
    return None


class _Run:
    """A run of several lives, with its checkpoints and what it read in a folder."""

    def __init__(
        self, folder: Path, config: TrainConfig, num_steps: int, start: int, program: Sequence[str]
    ) -> None:
        self.folder = folder
        self._config = _smallest(config, folder, num_steps)
        self.batches_per_step = config.training.accumulation_steps
        self._num_batches = num_steps * self.batches_per_step
        self._start = start
        self._program = program
        folder.mkdir()

    @property
    def checkpoints(self) -> Path:
        """Where its checkpoints are."""
        return self._config.training.checkpointing.save_dir

    def live(self, part: Part, number: int, *, seed: int) -> Outcome:
        """One part: from the newest checkpoint to its kill or to the end."""
        resume = find_latest_checkpoint(self.checkpoints)
        first_step = 0 if resume is None else int(load_checkpoint(resume, "meta")["step"])
        done = first_step * self.batches_per_step
        out = self.folder / f"part_{number}"
        out.mkdir()
        hold_after = self._num_batches
        if part.kill_after is not None:
            hold_after = min(part.kill_after + _GUARD_BATCHES, self._num_batches - 1) - done
        data = self._config.data.model_copy(update={"num_workers": part.num_workers})
        config = self._config.model_copy(update={"data": data})
        job = {
            "config": config.model_dump(mode="json"),
            "resume": None if resume is None else str(resume),
            "start": self._start,
            "hold_after": hold_after,
            "out": str(out),
        }
        path = out / "job.json"
        path.write_text(json.dumps(job), encoding="utf-8")
        with RankProcesses([*self._program, str(path)], part.world_size, out) as ranks:
            if part.kill_after is None:
                problem = ranks.wait_for_success()
            else:
                chance = random.Random(f"{seed}/{number}")  # noqa: S311
                num_batches = part.kill_after - done
                problem = ranks.wait_until(lambda: _num_recorded(out) >= num_batches)
                time.sleep(chance.uniform(0, 0.1))
                problem = problem or ranks.kill(only_one=part.is_one_killed)
        batches, to_first_batch_s = _read_records(out, part.world_size)
        return Outcome(
            first_step=first_step,
            batches=batches,
            to_first_batch_s=to_first_batch_s,
            problem=problem,
        )


def _smallest(config: TrainConfig, folder: Path, num_steps: int) -> TrainConfig:
    """The user's data and batches with the smallest model, on the CPU, in a folder."""
    training = config.training.model_copy(
        update={
            "max_steps": num_steps,
            "device": "cpu",
            "precision": "fp32",
            "compile": False,
            "num_threads": 1,
            "log_interval": num_steps,
            "eval_interval": num_steps + 1,
            "save_interval": SAVE_INTERVAL,
            "log_dir": folder / "runs",
            "checkpointing": config.training.checkpointing.model_copy(
                update={"save_dir": folder / "checkpoints", "keep_last_n": num_steps}
            ),
        }
    )
    model = ModelConfig(
        hidden_dim=16,
        num_layers=1,
        num_heads=1,
        vision_layers=0,
        patch_size=config.model.patch_size,
        tick_rate_hz=config.model.tick_rate_hz,
    )
    return config.model_copy(update={"training": training, "model": model})


def _num_recorded(out: Path) -> int:
    """Batches that the main rank has taken."""
    path = out / "record_0.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _read_records(out: Path, world_size: int) -> tuple[list[list[Sample]], float]:
    """Global batches that all ranks took, and the longest wait for the first one, in seconds."""
    shares, waits_s = [], [0.0]
    for rank in range(world_size):
        path = out / f"record_{rank}.jsonl"
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        values = [json.loads(line) for line in lines]  # what follows the last newline is torn
        shares.append([[tuple(sample) for sample in value["samples"]] for value in values])
        waits_s += [value["after_s"] for value in values[:1]]
    batches = [[s for share in group for s in share] for group in zip(*shares, strict=False)]
    return batches, max(waits_s)


def _live_again(
    run: _Run,
    parts: Sequence[Part],
    expected: Sequence[Sequence[Sample]],
    *,
    seed: int,
    say: Callable[[str], None],
) -> bool:
    """All parts of a run that is killed; whether it read what is expected, all of it."""
    is_same, num_read = True, 0
    for number, part in enumerate(parts):
        outcome = run.live(part, number, seed=seed)
        first = outcome.first_step * run.batches_per_step
        problem = outcome.problem or compare(outcome.batches, expected, first=first)
        if problem is None and first > num_read:
            problem = f"batches {num_read} to {first - 1} were never read"
        num_read = first + len(outcome.batches)
        if problem is None and number == len(parts) - 1 and num_read < len(expected):
            problem = f"it ended after batch {num_read - 1}"
        say(_describe(part, outcome, problem, number))
        is_same = is_same and problem is None
        if outcome.problem is not None:
            break
    return is_same


def _has_same_weights(killed: _Run, alone: _Run, say: Callable[[str], None]) -> bool:
    """Whether the last weights are apart by no more than rounding, of the way that they went."""
    first, expected, found = (
        torch.cat([tensor.flatten().double() for tensor in load_checkpoint(path)["model"].values()])
        for path in (
            alone.checkpoints / step_name(SAVE_INTERVAL),
            alone.checkpoints / FINAL_NAME,
            killed.checkpoints / FINAL_NAME,
        )
    )
    share = float((found - expected).norm() / (expected - first).norm())
    is_same = share <= MAX_WEIGHT_DIFFERENCE
    verdict = "same" if is_same else f"more than {MAX_WEIGHT_DIFFERENCE:.0%} is not rounding"
    say(f"weights at the end: apart by {share:.2%} of the way that they went: {verdict}")
    return is_same


def _describe(part: Part, outcome: Outcome, problem: str | None, number: int) -> str:
    ranks = f"{part.world_size} rank{'s' * (part.world_size > 1)}"
    end = "to the end"
    if part.kill_after is not None:
        victim = "its last rank" if part.is_one_killed else "all"
        end = f"{victim} killed after batch {part.kill_after}"
    return (
        f"part {number + 1}: from step {outcome.first_step}, {ranks} x {part.num_workers} loader "
        f"processes, {end}: {len(outcome.batches)} batches, the first after "
        f"{outcome.to_first_batch_s:.2f} s: {problem or 'same'}"
    )


class RankProcesses:
    """The same program as each of some ranks, without torchrun to look after them.

    A context manager: none is left behind. Each is the first of a process group of its own, and
    what it says goes to ``output_<rank>.txt``.

    Args:
        command: the program.
        world_size: how many.
        out: an existing folder for what they say.
    """

    def __init__(self, command: Sequence[str], world_size: int, out: Path) -> None:
        self._out = out
        port = free_port()
        self._processes = []
        for rank in range(world_size):
            with (out / f"output_{rank}.txt").open("wb") as output:
                self._processes.append(
                    subprocess.Popen(  # noqa: S603 (our own program)
                        command,
                        env={**os.environ, **rank_environment(rank, world_size, port)},
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )

    def __enter__(self) -> RankProcesses:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def wait_until(self, is_so: Callable[[], bool]) -> str | None:
        """Until something is so; a message where a rank ended before."""
        while not is_so():
            if any(process.poll() is not None for process in self._processes):
                return f"it ended by itself: {self._last_words()}"
            time.sleep(POLL_S)
        return None

    def wait_for_success(self) -> str | None:
        """Until all have ended; a message where one did not end well."""
        codes = [process.wait() for process in self._processes]
        return None if not any(codes) else f"exit codes {codes}: {self._last_words()}"

    def kill(self, *, only_one: bool) -> str | None:
        """Kill all, or the last rank; a message where the others do not end then."""
        if not only_one:
            self.__exit__()
            return None
        os.killpg(self._processes[-1].pid, signal.SIGKILL)
        deadline_s = time.monotonic() + END_TIMEOUT_S
        while time.monotonic() < deadline_s:
            if all(process.poll() is not None for process in self._processes):
                return None
            time.sleep(POLL_S)
        return f"{END_TIMEOUT_S:.0f} s after a rank was killed the others still run"

    def _last_words(self) -> str:
        outputs = [path.read_text(errors="replace") for path in self._out.glob("output_*.txt")]
        return " | ".join(text.strip()[-400:] for text in outputs if text.strip())


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank."""
    values = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": 1,
    }
    return {name: str(value) for name, value in values.items()}


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


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
    """A rank of a part, as :data:`PROGRAM` starts it."""
    train_part(json.loads(Path(arguments[0]).read_text(encoding="utf-8")))


if __name__ == "__main__":
    main(sys.argv[1:])
