"""Errors that a user can mend."""
import difflib
from collections.abc import Collection, Iterable


class PanguError(ValueError):
    """Something the user gave is wrong. Commands print it as it stands, without a traceback, and exit with code 2."""


class ConfigError(PanguError):
    """A config.json, or fields given in its place, contradict themselves or ask for what is not implemented."""


class CheckpointError(PanguError):
    """A checkpoint directory is damaged, incomplete, or does not fit its config."""


def one_line(error: PanguError) -> str:
    """An error that lists several findings, one a line, on a single line."""
    return "; ".join(line.strip() for line in str(error).splitlines()).replace(":; ", ": ")


def check_section(section: str, names: Iterable, known: Collection[str]) -> None:
    """`ConfigError` for the first of a section's keys that is not a known one, with the nearest that is."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1, 0)[0]
            raise ConfigError(f"{section}.{name}: no such key; did you mean {near}?")
