"""Errors a user can cause. Every message is one line: what was wrong, where, what would be right.

ValueError
└── ChatevalError      exit code 1
    ├── UsageError     the command line is wrong (exit code 2)
    ├── ScoringError   a model, task or source cannot be scored
    ├── ResultsError   a results folder is missing, damaged, or of another model or other settings
    └── SandboxError   model-written code cannot be isolated on this machine
"""


class ChatevalError(ValueError):
    """Base of all errors a user can cause. `exit_code` is the exit code of the command line."""

    exit_code = 1


class UsageError(ChatevalError):
    exit_code = 2


class ScoringError(ChatevalError): ...


class ResultsError(ChatevalError): ...


class SandboxError(ChatevalError): ...
