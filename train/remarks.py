"""What is said once before the first step: what a configuration asks for and hardly means, and what
is quiet for long. A pure function.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from train.config import TrainConfig


def remarks(
    config: TrainConfig, *, num_samples: int, not_held_out: str | None = None, num_ranks: int = 1
) -> Iterator[str]:
    """Lines for people, each with its mend.

    Args:
        config: the whole configuration.
        num_samples: of the train split.
        not_held_out: why no session is held out; None where some are.
        num_ranks: processes that train together.
    """
    data, training = config.data, config.training
    if not_held_out is not None:
        yield (
            f"nothing is held out: {not_held_out}; losses are of trained samples only, and say "
            "nothing of new ones. Record more sessions, or raise split.val_fraction in the recipe "
            "(and build the shards again)"
        )
    if data.batch_size > num_samples and data.mix is None:
        yield (
            f"data.batch_size is {data.batch_size}, and there are {num_samples} train samples: "
            f"the rest of each batch is padding of weight 0, at the cost of samples; set "
            f"data.batch_size: {num_samples} or less"
        )
    if training.parallel != "auto" and num_ranks == 1:
        yield (
            f"training.parallel is {training.parallel}, and this is one process: it changes "
            "nothing; start several by `torchrun --nproc-per-node=N -m train run ...`, or leave it "
            "auto"
        )
    if training.compile:
        yield "training.compile: the first step compiles the model, which takes minutes"
