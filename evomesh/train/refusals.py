"""Errors that end a run because its numbers went wrong."""

from __future__ import annotations

from evomesh.errors import EXIT_TRAINING_STOPPED, UserError


def no_target(step: int, tokens: int) -> UserError:
    """Describe a step that taught nothing, although its weight decay would have counted.

    It is found by the results of the step, which every rank reads anyway; counting
    before the step would cost every step a wait.
    """
    return UserError(
        f"step {step}: none of its {tokens:,} tokens is a target",
        expected="at least one token with a positive id",
        fix=f'leave this step out with data.skip_batches="{step}", raise data.micro_num, or see what it holds: '
        f"evomesh ledger CONFIG --step {step}",
        code="EVO-TRAIN-001",
    )


def endless_skipping(step: int, limit: int) -> UserError:
    return UserError(
        f"the gradient has been inf or NaN for {limit} consecutive steps (last: step {step}) and no update "
        "was applied",
        expected="a finite gradient",
        fix='try dtype "torch.bfloat16", a lower adam.lr or a longer warmup, or raise max_consecutive_skips',
        exit_code=EXIT_TRAINING_STOPPED,
        code="EVO-TRAIN-002",
    )


def endless_spikes(step: int, limit: int) -> UserError:
    return UserError(
        f"the last {limit} steps were spikes and no update was applied (last: step {step})",
        expected="a spike from time to time (spike.policy)",
        fix="raise spike.zscore, if the loss has settled at a new level, or max_consecutive_skips",
        exit_code=EXIT_TRAINING_STOPPED,
        code="EVO-TRAIN-003",
    )
