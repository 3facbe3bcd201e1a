"""Errors a user can cause. Every message is one line: what was wrong, where, what would be right.

ValueError
└── ChattrainError             exit code 1
    ├── ConfigError            model sizes that do not fit together, unknown or missing config keys
    ├── WeightsError           unknown, missing or wrongly shaped tensors, in a model or an optimizer state
    ├── RunError               a run that cannot be done as given, or whose files are damaged
    │   └── ResumeError        a run that cannot be continued, because its plan or recipe changed
    ├── RankError              another rank cannot be reached, or ended before this one
    ├── NonFiniteError         a loss, gradient, weight or optimizer state that is not finite
    ├── CheckpointError        a checkpoint that is missing, damaged, or cannot be written
    ├── DeviceError            a device that does not exist
    ├── AttentionError         a form of attention that the device cannot run
    ├── ImportNanochatError    a nanochat checkpoint folder that is incomplete or contradicts itself
    └── ExportError            an export that cannot be written
        └── VerifyError        an export that cannot be checked, or that is not the same model

A plan that cannot be made, or cut for these ranks, is chatdata's PlanError.
"""

from collections.abc import Iterable


def named(names: Iterable[str], most: int = 4) -> str:
    """Names for a one-line message: sorted, the first few and how many more, "none" if there are none."""
    listed = sorted(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return (", ".join(listed[:most]) or "none") + more


class ChattrainError(ValueError):
    """Root of all errors a user can cause in chattrain. `exit_code` is what the command line ends with."""

    exit_code = 1


class ConfigError(ChattrainError): ...


class WeightsError(ChattrainError): ...


class RunError(ChattrainError): ...


class ResumeError(RunError): ...


class RankError(ChattrainError): ...


class NonFiniteError(ChattrainError): ...


class CheckpointError(ChattrainError): ...


class DeviceError(ChattrainError): ...


class AttentionError(ChattrainError): ...


class ImportNanochatError(ChattrainError): ...


class ExportError(ChattrainError): ...


class VerifyError(ExportError): ...
