"""What a user can cause. Every message is one line: what was wrong, where, what would be right.

ValueError
└── ChatevalError
    ├── UsageError     a command line that asks for something that cannot be (exit code 2)
    ├── ScoringError   a model, a task or a source that cannot be scored
    ├── ResultsError   a results folder that is not there, damaged, or of another model or other settings
    └── SandboxError   isolation for model-written code that cannot be reached here
"""


class ChatevalError(ValueError):
    """Root of everything a user can cause in chateval. `exit_code` is what the command line ends with."""

    exit_code = 1


class UsageError(ChatevalError):
    """A command line that asks for something that cannot be."""

    exit_code = 2


class ScoringError(ChatevalError):
    """A model, a task or a source that cannot be scored."""


class ResultsError(ChatevalError):
    """A results folder that is not there, damaged, or of another model or other settings."""


class SandboxError(ChatevalError):
    """Isolation for model-written code that cannot be reached here."""
