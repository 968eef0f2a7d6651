"""What a run would take, found out without weights, data or a GPU: parameters, steps, tokens and memory.

    mats train RECIPE --dry_run --devices 4 --device_memory 80GB

The model is built at its full size on tensors without content, so that LLaMA-7B takes seconds and little memory. Of the
figures, parameters and what goes with them (weights, gradients, the optimizer's state) are exact. The rest is found by
running the forward and the backward pass of one micro-batch on such tensors (PyTorch's `FakeTensorMode`) and counting
which are alive at a time; see [`trace_step`].
"""

from training.dry_run.lengths import row_lengths, spread
from training.dry_run.model import build_model, count_model, fill_with_fakes
from training.dry_run.phases import MemoryPlan, language_model_bytes, quantised_layers
from training.dry_run.planning import plan
from training.dry_run.report import EVALUATION, TRAINING, Plan, Setup
from training.dry_run.sizes import find_text_config, parse_memory
from training.dry_run.trace import LiveMemory, StepTrace, trace_evaluation, trace_few_layers, trace_step

__all__ = [
    "EVALUATION",
    "TRAINING",
    "LiveMemory",
    "MemoryPlan",
    "Plan",
    "Setup",
    "StepTrace",
    "build_model",
    "count_model",
    "fill_with_fakes",
    "find_text_config",
    "language_model_bytes",
    "parse_memory",
    "plan",
    "quantised_layers",
    "row_lengths",
    "spread",
    "trace_evaluation",
    "trace_few_layers",
    "trace_step",
]
