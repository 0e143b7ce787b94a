"""Work beside the training: one piece at a time, in a thread that whoever ends the run waits for."""
from collections.abc import Callable
from concurrent import futures

from tqdm import tqdm

PATIENCE = 2.0  # seconds of waiting that nobody needs to be told of


class Background:
    """Does what `start` is given in a thread. What that raises, the next call of `start`, `check` or `wait` raises.

    The interpreter does not end before the thread has.

    Args:
        shows: whether this process tells the terminal what it waits for.
    """

    def __init__(self, shows: bool = True):
        self.shows = shows
        self._future, self._name = None, ""

    def start(self, name: str, work: Callable[[], None]) -> None:
        """Begin `work` when what was begun before is done. `name` says what it does to who waits for it."""
        self.wait()
        pool = futures.ThreadPoolExecutor(1)
        self._future, self._name = pool.submit(work), name
        pool.shutdown(wait=False)                                               # its thread ends with the work

    def check(self) -> None:
        """Returns at once."""
        if self._future and self._future.done():
            self.wait()

    def wait(self) -> None:
        """Return when nothing is being done."""
        if self._future is None:
            return
        if not futures.wait([self._future], PATIENCE).done:
            with tqdm(desc=self._name, bar_format="{desc}: {elapsed}", leave=False,
                      disable=None if self.shows else True) as bar:
                while not futures.wait([self._future], 1).done:
                    bar.refresh()
        future, self._future = self._future, None
        future.result()
