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
"""Starts one rank of a launch; its argument is a job file."""

SAVE_INTERVAL: Final = 3
"""Steps between checkpoints."""

MIN_STEPS: Final = SAVE_INTERVAL + 1
"""Fewest steps of a launch, so that each writes a checkpoint of its own."""

MAX_WORLD_SIZE: Final = 4
"""Most ranks of a launch."""

MAX_PROCESSES: Final = 8
"""Most ranks and loader processes of a launch."""

MAX_WEIGHT_DIFFERENCE: Final = 0.05
"""Allowed difference of the final weights, as a share of the distance that training moved them.

Another order of float32 sums makes less than 0.0001; a step taken twice or never, or lost moments,
far more.
"""

KILL_TIMEOUT_S: Final = 60.0
"""After one rank is killed, the others must end within this time."""

HOLD_S: Final = 600.0
"""A rank that waits for its kill gives up after this time."""

POLL_S: Final = 0.005

_GUARD_BATCHES: Final = 2
"""A launch waits for its kill this many batches after the planned one."""

Sample = tuple[str, int, bool]
"""Key of a sample, CRC-32 of its valid inputs, and whether it counts (False for padding)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One start of the ranks of a run, up to a kill or to the end of training."""

    world_size: int
    num_workers: int
    kill_after: int | None
    """Batches of the whole run after which it is killed; None trains to the end."""
    kills_one_rank: bool = False
    """Whether only the last rank is killed; the others must then end by themselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a launch read."""

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
    log: Callable[[str], None] = print,
) -> bool:
    """Compare a run that is killed and resumed with one that is not.

    Args:
        config: the user's; only its model, device and intervals are replaced.
        num_kills: how often the run is killed and resumed.
        num_steps: steps of both runs.
        seed: decides kills, ranks and loader processes.
        program: starts one rank, given a job file.
        log: receives one line per launch.

    Returns:
        Whether samples and weights are the same.

    Raises:
        EngineError: the configuration or the data can't be used, or the undisturbed run failed.
    """
    batches_per_step = config.training.accumulation_steps
    launches = plan_launches(
        num_kills=num_kills,
        num_steps=num_steps,
        batches_per_step=batches_per_step,
        batch_size=config.data.batch_size,
        seed=seed,
    )
    # Errors of the data are raised here, before any process starts.
    loader = Loader(open_source(config, split="train"), config)
    first_batch = max(0, loader.batches_per_epoch - num_steps * batches_per_step // 2)
    log(
        f"{num_steps} steps of {batches_per_step} x {config.data.batch_size} samples, from batch "
        f"{first_batch} on; an epoch has {loader.batches_per_epoch}"
    )
    with tempfile.TemporaryDirectory(prefix="selftest-") as name:
        undisturbed, killed = (
            _Run(
                Path(name) / kind,
                config=config,
                num_steps=num_steps,
                first_batch=first_batch,
                program=program,
            )
            for kind in ("undisturbed", "killed")
        )
        whole = undisturbed.start(Launch(world_size=1, num_workers=0, kill_after=None), 0)
        if whole.problem is not None:
            raise EngineError(f"the undisturbed run failed: {whole.problem}")
        log(f"undisturbed: 1 rank, 0 loader processes: {len(whole.batches)} batches")
        is_same = _reads_same_batches(killed, launches, whole.batches, seed=seed, log=log)
        is_same = is_same and _has_same_weights(killed, undisturbed, log)
    log("PASS: the killed run equals the undisturbed one" if is_same else "FAIL: see above")
    return is_same


def plan_launches(
    *, num_kills: int, num_steps: int, batches_per_step: int, batch_size: int, seed: int
) -> list[Launch]:
    """Plan the launches of a run that is killed `num_kills` times.

    Each launch has another number of ranks and of loader processes than the previous one.

    Raises:
        ConfigError: there are too few steps for that many kills.
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
    launches: list[Launch] = []
    world_size, num_workers = 1, 0
    for number in range(num_kills + 1):
        others = [
            (w, n)
            for w, n in layouts
            if n != num_workers and (w != world_size or has_one_world_size)
        ]
        world_size, num_workers = rng.choice(others)
        kill_after = None
        if number < num_kills:
            step = (number + 1) * MIN_STEPS + extra_steps[number]
            kill_after = step * batches_per_step - rng.randrange(batches_per_step)
        launches.append(
            Launch(
                world_size=world_size,
                num_workers=num_workers,
                kill_after=kill_after,
                kills_one_rank=world_size > 1 and number % 2 == 1,
            )
        )
    return launches


def compare(
    batches: Sequence[Sequence[Sample]], expected: Sequence[Sequence[Sample]], *, first: int
) -> str | None:
    """Describe the first difference of a launch's batches from the expected ones; None if equal.

    Args:
        batches: of the launch.
        expected: of the whole run.
        first: index of the launch's first batch in the run.
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


class _Run:
    """A run of one or more launches, with its checkpoints and records in a folder."""

    def __init__(
        self,
        folder: Path,
        *,
        config: TrainConfig,
        num_steps: int,
        first_batch: int,
        program: Sequence[str],
    ) -> None:
        self.folder = folder
        self._config = _smallest(config, folder, num_steps)
        self.batches_per_step = config.training.accumulation_steps
        self._num_batches = num_steps * self.batches_per_step
        self._first_batch = first_batch
        self._program = program
        folder.mkdir()

    @property
    def checkpoints(self) -> Path:
        """Folder of its checkpoints."""
        return self._config.training.checkpointing.save_dir

    def start(self, launch: Launch, number: int, *, seed: int = 0) -> Outcome:
        """Train from the newest checkpoint to the launch's kill or to the end."""
        resume = find_latest_checkpoint(self.checkpoints)
        first_step = 0 if resume is None else int(load_checkpoint(resume, "meta")["step"])
        num_before = first_step * self.batches_per_step
        out = self.folder / f"launch_{number}"
        out.mkdir()
        hold_after = self._num_batches
        if launch.kill_after is not None:
            last = min(launch.kill_after + _GUARD_BATCHES, self._num_batches - 1)
            hold_after = last - num_before
        data = self._config.data.model_copy(update={"num_workers": launch.num_workers})
        job = {
            "config": self._config.model_copy(update={"data": data}).model_dump(mode="json"),
            "resume": None if resume is None else str(resume),
            "first_batch": self._first_batch,
            "hold_after": hold_after,
            "out": str(out),
        }
        path = out / "job.json"
        path.write_text(json.dumps(job), encoding="utf-8")
        with RankProcesses([*self._program, str(path)], launch.world_size, out) as ranks:
            if launch.kill_after is None:
                problem = ranks.wait_for_success()
            else:
                num_batches = launch.kill_after - num_before
                problem = ranks.wait_until(lambda: _num_recorded(out) >= num_batches)
                # Kill at a random moment within the step.
                time.sleep(random.Random(f"{seed}/{number}").uniform(0, 0.1))  # noqa: S311
                problem = problem or ranks.kill(only_one=launch.kills_one_rank)
        batches, to_first_batch_s = _read_records(out, launch.world_size)
        return Outcome(
            first_step=first_step,
            batches=batches,
            to_first_batch_s=to_first_batch_s,
            problem=problem,
        )


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


def _num_recorded(out: Path) -> int:
    """Count the batches that the main rank took."""
    path = out / "record_0.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _read_records(out: Path, world_size: int) -> tuple[list[list[Sample]], float]:
    """Read the global batches that all ranks took, and the longest wait for the first, in s."""
    shares, waits_s = [], [0.0]
    for rank in range(world_size):
        path = out / f"record_{rank}.jsonl"
        # A kill can tear the last line; complete lines end with a newline.
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        values = [json.loads(line) for line in lines]
        shares.append([[tuple(sample) for sample in value["samples"]] for value in values])
        waits_s += [value["after_s"] for value in values[:1]]
    batches = [[s for share in group for s in share] for group in zip(*shares, strict=False)]
    return batches, max(waits_s)


def _reads_same_batches(
    run: _Run,
    launches: Sequence[Launch],
    expected: Sequence[Sequence[Sample]],
    *,
    seed: int,
    log: Callable[[str], None],
) -> bool:
    """Run all launches; whether together they read exactly the expected batches."""
    is_same, num_read = True, 0
    for number, launch in enumerate(launches):
        outcome = run.start(launch, number, seed=seed)
        first = outcome.first_step * run.batches_per_step
        problem = outcome.problem or compare(outcome.batches, expected, first=first)
        if problem is None and first > num_read:
            problem = f"batches {num_read} to {first - 1} were never read"
        num_read = first + len(outcome.batches)
        if problem is None and number == len(launches) - 1 and num_read < len(expected):
            problem = f"it ended after batch {num_read - 1}"
        log(_describe(launch, outcome, problem, number))
        is_same = is_same and problem is None
        if outcome.problem is not None:
            break
    return is_same


def _has_same_weights(killed: _Run, undisturbed: _Run, log: Callable[[str], None]) -> bool:
    """Whether the final weights differ by no more than rounding; see MAX_WEIGHT_DIFFERENCE."""
    first, expected, actual = (
        torch.cat([tensor.flatten().double() for tensor in load_checkpoint(path)["model"].values()])
        for path in (
            undisturbed.checkpoints / step_name(SAVE_INTERVAL),
            undisturbed.checkpoints / FINAL_NAME,
            killed.checkpoints / FINAL_NAME,
        )
    )
    share = float((actual - expected).norm() / (expected - first).norm())
    is_same = share <= MAX_WEIGHT_DIFFERENCE
    verdict = "same" if is_same else f"more than {MAX_WEIGHT_DIFFERENCE:.0%} is not rounding"
    log(f"final weights differ by {share:.2%} of the distance that training moved them: {verdict}")
    return is_same


def _describe(launch: Launch, outcome: Outcome, problem: str | None, number: int) -> str:
    ranks = f"{launch.world_size} rank{'s' * (launch.world_size > 1)}"
    end = "to the end"
    if launch.kill_after is not None:
        victim = "last rank" if launch.kills_one_rank else "all"
        end = f"{victim} killed after batch {launch.kill_after}"
    return (
        f"launch {number + 1}: from step {outcome.first_step}, {ranks} x {launch.num_workers} "
        f"loader processes, {end}: {len(outcome.batches)} batches, the first after "
        f"{outcome.to_first_batch_s:.2f} s: {problem or 'same'}"
    )


class RankProcesses:
    """Processes of all ranks of one program, without torchrun and its restarts.

    A context manager: no process outlives it. Each rank leads a process group of its own and writes
    its output to ``output_<rank>.txt``.

    Args:
        command: the program.
        world_size: number of ranks.
        out: an existing folder for the outputs.
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

    def kill(self, *, only_one: bool) -> str | None:
        """Kill all ranks, or only the last; return a message if the others do not end then."""
        if not only_one:
            self.__exit__()
            return None
        os.killpg(self._processes[-1].pid, signal.SIGKILL)
        deadline_s = time.monotonic() + KILL_TIMEOUT_S
        while time.monotonic() < deadline_s:
            if all(process.poll() is not None for process in self._processes):
                return None
            time.sleep(POLL_S)
        return f"{KILL_TIMEOUT_S:.0f} s after one rank was killed, other ranks still run"

    def _output_tails(self) -> str:
        outputs = [path.read_text(errors="replace") for path in self._out.glob("output_*.txt")]
        return " | ".join(text.strip()[-400:] for text in outputs if text.strip())


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Make the environment variables that torchrun sets for a rank."""
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
    """Find a port of this machine that no process listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class RecordedLoader:
    """A loader that records each batch before the trainer gets it.

    Args:
        loader: the real one.
        path: of the record, one line of JSON per batch.
        hold_after: after this many batches it waits for a kill.
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
        started_s = time.perf_counter()
        with self._path.open("w", encoding="utf-8") as file:
            for number, batch in enumerate(self._loader):
                if number == self._hold_after:
                    _hold()
                after_s = time.perf_counter() - started_s
                file.write(json.dumps({"after_s": after_s, "samples": samples_of(batch)}) + "\n")
                file.flush()
                yield batch


def _hold() -> None:
    """Wait for a kill; raise, as a training step does, if another rank is gone."""
    deadline_s = time.monotonic() + HOLD_S
    while time.monotonic() < deadline_s:
        distributed.any_rank(False)
        time.sleep(0.02)


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


def train_rank(job: Mapping[str, Any]) -> None:
    """Train one rank of a launch."""
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
            recorded.load_state_dict(recorded.state_at(job["first_batch"]))
        else:
            trainer.load_checkpoint(job["resume"])
        trainer.train()


def main(arguments: Sequence[str]) -> None:
    """Train one rank of a launch, as :data:`PROGRAM` starts it."""
    train_rank(json.loads(Path(arguments[0]).read_text(encoding="utf-8")))


if __name__ == "__main__":
    main(sys.argv[1:])
