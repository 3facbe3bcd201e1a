"""`chattrain run --dry-run`: the plan in numbers, what the model costs, and one real step, timed."""

from __future__ import annotations

import time
from typing import Any

from chattrain.batches import read_step
from chattrain.loop import Job, train_step
from chattrain.optim import optimizer_tensors
from chattrain.run.telemetry import flops_per_token, peak_memory


def dry_run(job: Job) -> dict[str, Any]:
    """Do the step the run would begin with (nothing is saved) and estimate the rest from it.

    The step is done twice and the second one timed: the first also compiles and allocates.
    """
    batch = job.settings.device_batch_size
    step = read_step(job.plan, job.start, job.ranks.rank, job.ranks.num_ranks, batch)
    for _ in range(2):
        started = time.perf_counter()
        result = train_step(job, step)
        duration_s = time.perf_counter() - started
    parameters = sum(parameter.numel() for parameter in job.model.parameters())
    state = sum(t.numel() * t.element_size() for t in optimizer_tensors(job.model, job.optimizers).values())
    return {
        "plan": job.plan.counts(),
        "steps": job.num_steps,
        "stage": job.stage.name,
        "dtype": job.dtype,
        "device": str(job.ranks.device),
        "ranks": job.ranks.num_ranks,
        "parameters": parameters,
        "flops_per_token": flops_per_token(job.model.config, job.plan.seq_len),
        "memory_bytes": {
            "weights_and_gradients": 2 * parameters * 4,
            "optimizer": state,
            "peak_of_one_step": peak_memory(job.ranks.device),
        },
        "step": {"duration_s": round(duration_s, 3), "tokens_per_s": round(step.num_tokens / duration_s)},
        "first_loss": result.loss,
        "estimated_duration_s": round(duration_s * (job.num_steps - job.start), 1),
    }
