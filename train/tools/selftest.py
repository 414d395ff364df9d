"""``train selftest``: compare a killed and resumed run with an undisturbed one, on the user's data.

The undisturbed run has one process and no loader processes. The other run is killed (SIGKILL) at
random steps and resumed from its newest checkpoint with other numbers of ranks and loader
processes. It must train on the same samples in the same order, to the byte, and reach the same
weights.

Data, configuration, loader, trainer and checkpoints are the real ones, in processes as torchrun
starts them. Only the model is the smallest one, on the CPU, so that the test takes minutes. The
runs start shortly before the end of an epoch and cross it.

One rank of a launch is started as ``python -m train.tools.selftest JOB.json``, in torchrun's
environment.
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
from typing import TYPE_CHECKING, Final, Self

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
    from collections.abc import Callable, Iterator, Sequence

    from train.data.batch import Batch

PROGRAM: Final = (sys.executable, "-m", "train.tools.selftest")
"""Starts one rank of a launch; its argument is a job file."""

SAVE_INTERVAL: Final = 3
"""Steps between checkpoints."""

MIN_STEPS: Final = SAVE_INTERVAL + 1
"""Fewest steps of a launch, so that each writes a checkpoint of its own."""

MAX_WORLD_SIZE: Final = 4
MAX_PROCESSES: Final = 8
"""Most ranks and loader processes of a launch."""

MAX_WEIGHT_DIFFERENCE: Final = 0.05
"""Allowed difference of the final weights, as a share of the distance that training moved them.

Another order of float32 sums makes less than 0.0001; a step taken twice or never, or lost moments,
far more.
"""

HOLD_S: Final = 600.0
"""A rank waits for its kill for this time, and then trains on."""

POLL_S: Final = 0.01

_GUARD_BATCHES: Final = 2
"""A launch waits for its kill this many batches after the planned one."""

Sample = tuple[str, int, bool]
"""Key of a sample, CRC-32 of its valid inputs, and whether it counts (False for padding)."""

Batches = list[list[Sample]]
"""Global batches, in order."""


@dataclass(frozen=True, slots=True)
class Launch:
    """One start of the ranks of a run, up to a kill or to the end of training."""

    world_size: int
    num_workers: int
    kill_after: int | None = None
    """Batches of the whole run after which it is killed; None trains to the end."""

    def __str__(self) -> str:
        ranks = f"{self.world_size} rank{'s' * (self.world_size > 1)}"
        has_kill = self.kill_after is not None
        end = f"killed after batch {self.kill_after}" if has_kill else "to the end"
        return f"{ranks} x {self.num_workers} loader processes, {end}"


def run_selftest(
    config: TrainConfig,
    *,
    num_kills: int = 2,
    num_steps: int = 40,
    seed: int = 0,
    program: Sequence[str] = PROGRAM,
    log: Callable[[str], None] = print,
) -> bool:
    """Compare a run that is killed and resumed with one that is not; whether they are the same.

    `config`: the user's; only its model, device and intervals are replaced.
    `seed`: decides kills, ranks and loader processes.
    `program`: starts one rank, given a job file.
    """
    batches_per_step = config.training.accumulation_steps
    batch_size = config.data.batch_size
    launches = plan_launches(
        num_kills=num_kills,
        num_steps=num_steps,
        batches_per_step=batches_per_step,
        batch_size=batch_size,
        seed=seed,
    )
    # Errors of the data are raised here, before any process starts.
    loader = Loader(open_source(config, split="train"), config)
    first_batch = max(0, loader.batches_per_epoch - num_steps * batches_per_step // 2)
    log(
        f"{num_steps} steps of {batches_per_step} x {batch_size} samples, from batch {first_batch} "
        f"on; an epoch has {loader.batches_per_epoch}"
    )
    with tempfile.TemporaryDirectory(prefix="selftest-") as name:
        undisturbed, killed = (
            _Run(
                folder=Path(name) / kind,
                config=_smallest(config, Path(name) / kind, num_steps),
                first_batch=first_batch,
                program=program,
            )
            for kind in ("undisturbed", "killed")
        )
        _, expected, problem = undisturbed.start(Launch(1, 0), 0)
        if problem is not None:
            raise EngineError(f"the undisturbed run failed: {problem}")
        log(f"undisturbed: 1 rank, 0 loader processes: {len(expected)} batches")
        is_same = _reads_same_batches(killed, launches, expected, log=log)
        is_same = is_same and _has_same_weights(killed, undisturbed, log)
    log("PASS: the killed run equals the undisturbed one" if is_same else "FAIL: see above")
    return is_same


def plan_launches(
    *, num_kills: int, num_steps: int, batches_per_step: int, batch_size: int, seed: int
) -> list[Launch]:
    """Plan the launches of a run that is killed `num_kills` times.

    Each launch has another number of ranks and of loader processes than the previous one.
    """
    min_steps = (num_kills + 1) * MIN_STEPS
    if num_steps < min_steps:
        raise ConfigError(
            f"{num_kills} kills need at least {min_steps} steps; fix: set --steps {min_steps}"
        )
    rng = random.Random(seed)  # noqa: S311 (not a secret)
    extra_steps = sorted(rng.randint(0, num_steps - min_steps) for _ in range(num_kills))
    layouts = [
        (world_size, num_workers)
        for world_size in range(1, MAX_WORLD_SIZE + 1)
        for num_workers in range(3)
        if batch_size % world_size == 0 and world_size * (1 + num_workers) <= MAX_PROCESSES
    ]
    has_one_world_size = len({world_size for world_size, _ in layouts}) == 1
    launches = [Launch(1, 0)]  # the undisturbed run, from which the first launch differs
    for number in range(num_kills + 1):
        last = launches[-1]
        others = [
            (w, n)
            for w, n in layouts
            if n != last.num_workers and (w != last.world_size or has_one_world_size)
        ]
        layout, kill_after = rng.choice(others), None
        if number < num_kills:
            step = (number + 1) * MIN_STEPS + extra_steps[number]
            kill_after = step * batches_per_step - rng.randrange(batches_per_step)
        launches.append(Launch(*layout, kill_after))
    return launches[1:]


def compare(batches: Batches, expected: Batches, *, first: int) -> str | None:
    """Describe the first difference from the expected batches of the whole run; None if equal.

    `first`: index of the launch's first batch in the run.
    """
    for number, batch in enumerate(batches, start=first):
        if number >= len(expected):
            return f"batch {number} is one too many"
        if batch != expected[number]:
            pairs = zip(batch, expected[number], strict=False)
            row = next((i for i, (one, other) in enumerate(pairs) if one != other), 0)
            sample, expected_sample = batch[row : row + 1], expected[number][row : row + 1]
            return f"batch {number}, sample {row} is {sample}; expected {expected_sample}"
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """A run of one or more launches, with its checkpoints and records in a folder."""

    folder: Path
    config: TrainConfig
    first_batch: int
    program: Sequence[str]

    def start(self, launch: Launch, number: int) -> tuple[int, Batches, str | None]:
        """Train from the newest checkpoint to the launch's kill or to the end.

        Returns the index of its first batch, its global batches, and what went wrong.
        """
        training = self.config.training
        resume = find_latest_checkpoint(training.checkpointing.save_dir)
        first_step = 0 if resume is None else int(load_checkpoint(resume, "meta")["step"])
        first = first_step * training.accumulation_steps
        num_batches = training.max_steps * training.accumulation_steps
        hold_after = num_batches
        if launch.kill_after is not None:
            hold_after = min(launch.kill_after + _GUARD_BATCHES, num_batches - 1) - first
        data = self.config.data.model_copy(update={"num_workers": launch.num_workers})
        job = {
            "config": self.config.model_copy(update={"data": data}).model_dump(mode="json"),
            "resume": None if resume is None else str(resume),
            "first_batch": self.first_batch,
            "hold_after": hold_after,
        }
        out = self.folder / f"launch_{number}"
        out.mkdir(parents=True)
        path = out / "job.json"
        path.write_text(json.dumps(job), encoding="utf-8")
        with RankProcesses([*self.program, str(path)], launch.world_size, out) as ranks:
            if launch.kill_after is None:
                problem = ranks.wait_for_success()
            else:
                num_before_kill = launch.kill_after - first
                problem = ranks.wait_until(lambda: len(_read_record(out, 0)) >= num_before_kill)
                time.sleep(random.uniform(0, 0.1))  # noqa: S311 (any moment within the step)
        shares = [_read_record(out, rank) for rank in range(launch.world_size)]
        batches = [[s for share in group for s in share] for group in zip(*shares, strict=False)]
        return first, batches, problem


def _smallest(config: TrainConfig, folder: Path, num_steps: int) -> TrainConfig:
    """Combine the user's data and batches with the smallest model, on the CPU, in a folder."""
    checkpointing = {"save_dir": folder / "checkpoints", "keep_last_n": num_steps}
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
            "checkpointing": config.training.checkpointing.model_copy(update=checkpointing),
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


def _read_record(out: Path, rank: int) -> list[list[Sample]]:
    """Read a rank's share of each batch that it took."""
    path = out / f"record_{rank}.jsonl"
    # A kill can tear the last line; complete lines end with a newline.
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [[tuple(sample) for sample in json.loads(line)] for line in lines]


def _reads_same_batches(
    run: _Run, launches: Sequence[Launch], expected: Batches, *, log: Callable[[str], None]
) -> bool:
    """Run all launches; whether together they read exactly the expected batches."""
    is_same, num_read = True, 0
    for number, launch in enumerate(launches):
        first, batches, failure = run.start(launch, number)
        problem = failure or compare(batches, expected, first=first)
        if problem is None and first > num_read:
            problem = f"batches {num_read} to {first - 1} were never read"
        num_read = first + len(batches)
        if problem is None and number == len(launches) - 1 and num_read < len(expected):
            problem = f"it ended after batch {num_read - 1}"
        log(
            f"launch {number + 1}: from step {first // run.config.training.accumulation_steps}, "
            f"{launch}: {len(batches)} batches: {problem or 'same'}"
        )
        is_same = is_same and problem is None
        if failure is not None:
            break
    return is_same


def _has_same_weights(killed: _Run, undisturbed: _Run, log: Callable[[str], None]) -> bool:
    """Whether the final weights differ by no more than rounding; see MAX_WEIGHT_DIFFERENCE."""
    first, expected, actual = (
        torch.cat([t.flatten().double() for t in load_checkpoint(path)["model"].values()])
        for path in (
            undisturbed.config.training.checkpointing.save_dir / step_name(SAVE_INTERVAL),
            undisturbed.config.training.checkpointing.save_dir / FINAL_NAME,
            killed.config.training.checkpointing.save_dir / FINAL_NAME,
        )
    )
    share = float((actual - expected).norm() / (expected - first).norm())
    is_same = share <= MAX_WEIGHT_DIFFERENCE
    verdict = "same" if is_same else f"more than {MAX_WEIGHT_DIFFERENCE:.0%} is not rounding"
    log(f"final weights differ by {share:.2%} of the distance that training moved them: {verdict}")
    return is_same


class RankProcesses:
    """Processes of all ranks of one program, without torchrun and its restarts.

    A context manager: no process outlives it. Each rank leads a process group of its own and writes
    its output to ``output_<rank>.txt`` in the folder `out`.
    """

    def __init__(self, command: Sequence[str], world_size: int, out: Path) -> None:
        self._out = out
        port = free_port()
        self._processes = []
        for rank in range(world_size):
            with (out / f"output_{rank}.txt").open("wb") as output:
                process = subprocess.Popen(  # noqa: S603 (our own program)
                    command,
                    env={**os.environ, **rank_environment(rank, world_size, port)},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self._processes.append(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def wait_until(self, is_true: Callable[[], bool]) -> str | None:
        """Wait until a condition is true; return a message if a rank ends before."""
        while not is_true():
            if any(process.poll() is not None for process in self._processes):
                return f"a rank ended by itself: {self._output_tails()}"
            time.sleep(POLL_S)
        return None

    def wait_for_success(self) -> str | None:
        """Wait until all ranks have ended; return a message if one failed."""
        codes = [process.wait() for process in self._processes]
        return None if not any(codes) else f"exit codes {codes}: {self._output_tails()}"

    def _output_tails(self) -> str:
        outputs = [path.read_text(errors="replace") for path in self._out.glob("output_*.txt")]
        return " | ".join(text.strip()[-400:] for text in outputs if text.strip())


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Make the environment variables that torchrun sets for a rank."""
    return {
        **dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)),
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(world_size)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def free_port() -> int:
    """Find a port of this machine that no process listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class RecordedLoader(Loader):
    """A loader that records each batch before the trainer gets it, one line of JSON per batch."""

    def record(self, path: Path, *, hold_after: int) -> None:
        """Record to a file; after `hold_after` batches, wait for a kill."""
        self._path, self._hold_after = path, hold_after

    def __iter__(self) -> Iterator[Batch]:
        with self._path.open("w", encoding="utf-8") as file:
            for number, batch in enumerate(super().__iter__()):
                if number == self._hold_after:
                    time.sleep(HOLD_S)
                file.write(json.dumps(samples_of(batch)) + "\n")
                file.flush()
                yield batch


def samples_of(batch: Batch) -> list[Sample]:
    """Identify each row of a batch.

    The padding of dense text depends on the rank, so only valid inputs count.
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


def main(arguments: Sequence[str]) -> None:
    """Train one rank of a launch, as :data:`PROGRAM` starts it."""
    path = Path(arguments[0])
    job = json.loads(path.read_text(encoding="utf-8"))
    config = TrainConfig.model_validate(job["config"])
    with distributed.process_group(torch.device("cpu")):
        rank, world_size = distributed.rank(), distributed.world_size()
        source = open_source(config, split="train")
        loader = RecordedLoader(source, config, rank=rank, world_size=world_size)
        loader.record(path.with_name(f"record_{rank}.jsonl"), hold_after=job["hold_after"])
        torch.manual_seed(config.training.seed)
        model = MultiModalCreature(config, loader.shapes)
        trainer = Trainer(model, config, loader, run_name="selftest", console=Console(quiet=True))
        if job["resume"] is None:
            loader.load_state_dict(loader.state_at(job["first_batch"]))
        else:
            trainer.load_checkpoint(job["resume"])
        trainer.train()


if __name__ == "__main__":
    main(sys.argv[1:])
