"""What a run adds to the stock `Trainer`."""

import torch
from transformers import TrainerCallback

from modeling_mats.modeling_mats import MatsNoise


class NoiseWarmup(TrainerCallback):
    """Raises the noise from none to the configured variance between two steps.

    A small model that starts in full noise learns to ignore the embedding: it settles on the most frequent answers and
    stays there for thousands of steps. With clear embeddings at first, it reads them within two hundred.
    """

    def __init__(self, first_step: int, last_step: int):
        self.first_step = first_step
        self.last_step = last_step
        self.variance: float | None = None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        noise = next(module for module in model.modules() if isinstance(module, MatsNoise))
        if self.variance is None:
            self.variance = noise.variance
        done = (state.global_step - self.first_step) / (self.last_step - self.first_step)
        noise.variance = self.variance * min(1.0, max(0.0, done))

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self.variance is not None:
            next(module for module in model.modules() if isinstance(module, MatsNoise)).variance = self.variance


class RankSeed(TrainerCallback):
    """Seeds each of several ranks differently: the `Trainer` seeds all alike, so that they would share their dropout.

    A resumed run reads the state of its rank after this.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        if args.world_size > 1:
            torch.manual_seed(args.seed + args.process_index)


__all__ = ["NoiseWarmup", "RankSeed"]
