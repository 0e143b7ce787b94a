"""Errors that a user can mend."""


class PanguError(ValueError):
    """Something the user gave is wrong. Commands print it as it stands, without a traceback, and exit with code 2."""


class ConfigError(PanguError):
    """A config.json, or fields given in its place, contradict themselves or ask for what is not implemented."""


class CheckpointError(PanguError):
    """A checkpoint directory is damaged, incomplete, or does not fit its config."""


def one_line(error: PanguError) -> str:
    """An error that lists several findings, one a line, on a single line."""
    return "; ".join(line.strip() for line in str(error).splitlines()).replace(":; ", ": ")
