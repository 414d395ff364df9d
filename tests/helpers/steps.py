"""A step of training, measured."""

from __future__ import annotations

import torch

from train.loop.optim import make_optimizer
from train.model.multimodal import MultiModalCreature
from train.tools.profile import TrainingStep

CPU = torch.device("cpu")


def make_step(config, shapes):
    torch.manual_seed(1)
    model = MultiModalCreature(config, shapes).train()
    optimizer = make_optimizer(model, config.training.optimizer)
    return model, optimizer, TrainingStep(model, optimizer, config=config, device=CPU)
