"""What a user can cause. Every message is one line: what was wrong, where, what would be right.

ValueError
└── ChattrainError
    ├── ConfigError            model sizes that do not fit together, unknown or missing config keys
    ├── WeightsError           unknown, missing or wrongly shaped tensors, in a model or an optimizer state
    ├── UnknownStageError      a stage that stages.toml does not have
    ├── RunError               a run that cannot be done as asked
    │   └── ResumeError        a run that cannot be continued: another recipe
    ├── NonFiniteError         a loss or gradient that is not finite, before the update
    ├── CheckpointError        a checkpoint that is not there, damaged, or cannot be written
    ├── DeviceError            a device that is not there
    ├── UsageError             a command line that asks for something that cannot be (exit code 2)
    ├── AttentionError         a form of attention asked for on a device that cannot run it
    ├── ImportNanochatError    a nanochat checkpoint folder that is incomplete or contradicts itself
    └── ExportError            an export that cannot be written
        └── VerifyError        an export that cannot be checked, or that is not the same model

A plan that cannot be made, cut for these ranks, or continued is a PlanError of chatdata, which plans the sequences.
"""

from collections.abc import Iterable


def named(names: Iterable[str], most: int = 4) -> str:
    """Names for a one-line message: sorted, the first few and how many more, "none" if there are none."""
    listed = sorted(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return (", ".join(listed[:most]) or "none") + more


def first_line(error: Exception) -> str:
    """What a library's error says, for a one-line message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class ChattrainError(ValueError):
    """Root of everything a user can cause in chattrain. `exit_code` is what the command line ends with."""

    exit_code = 1


class ConfigError(ChattrainError):
    """Model sizes that do not fit together, unknown or missing config keys."""


class WeightsError(ChattrainError):
    """Unknown, missing or wrongly shaped tensors."""


class UnknownStageError(ChattrainError):
    """A stage that stages.toml does not have."""


class RunError(ChattrainError):
    """A run that cannot be done as asked."""


class ResumeError(RunError):
    """A run that cannot be continued: another recipe than it began with."""


class NonFiniteError(ChattrainError):
    """A loss or gradient that is not finite; nothing was updated."""


class CheckpointError(ChattrainError):
    """A checkpoint that is not there, damaged, or cannot be written."""


class DeviceError(ChattrainError):
    """A device that is not there."""


class UsageError(ChattrainError):
    """A command line that asks for something that cannot be."""

    exit_code = 2


class AttentionError(ChattrainError):
    """A form of attention asked for on a device that cannot run it."""


class ImportNanochatError(ChattrainError):
    """A nanochat checkpoint folder that is incomplete or contradicts itself."""


class ExportError(ChattrainError):
    """An export that cannot be written."""


class VerifyError(ExportError):
    """An export that cannot be checked, or that is not the same model."""
