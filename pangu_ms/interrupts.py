"""Ctrl-C while MindSpore runs a graph."""
import contextlib
import signal


@contextlib.contextmanager
def ctrl_c():
    """In here, and afterwards, Ctrl-C raises KeyboardInterrupt. For the main thread.

    Whenever a graph runs, MindSpore replaces Python's handler by one that answers Ctrl-C with SIGTERM to its own
    process, and leaves it there. So SIGTERM raises KeyboardInterrupt in here, too; while a graph runs or is compiled,
    behind that.
    """
    terminate = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, terminate)
        signal.signal(signal.SIGINT, signal.default_int_handler)
