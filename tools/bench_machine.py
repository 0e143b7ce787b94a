"""What the machine itself can do, on the cores that a benchmark may use, and how calls are timed."""
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pangu_ms.errors import PanguError


def use_cores(count: int) -> None:
    """Keep all threads to `count` cores: those that exist (numpy's), and those that will be made."""
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= count <= len(cores):
        raise PanguError(f"--threads is {count}: wanted 1 to {len(cores)}, the cores this process may use")
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), cores[:count])


def memory_bandwidth(threads: int, shape: tuple[int, int] = (65536, 2048)) -> float:
    """Bytes a second of a float32 matrix-vector product; the default matrix has 512 MiB, far more than any cache.

    numpy's product, each thread with its part of the rows: MindSpore's is slower, and the floor is the machine's.
    """
    matrix, vector = np.ones(shape, np.float32), np.ones(shape[1], np.float32)
    parts = np.array_split(matrix, threads)
    with ThreadPoolExecutor(threads) as pool:
        return matrix.nbytes / best_seconds(lambda: list(pool.map(lambda part: part @ vector, parts)), 8)


def product_rate(size: int = 4096) -> float:
    """Floating-point operations a second of MindSpore's product of two square float32 matrices."""
    from mindspore import ops
    square = ops.ones((size, size))
    return 2 * size ** 3 / best_seconds(lambda: ops.matmul(square, square).asnumpy(), 5)


def best_seconds(call, times: int) -> float:
    return min(timed(call) for _ in range(times))


def timed(call) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def say(what: str) -> None:
    print(f"bench.py: {what} ...", file=sys.stderr, flush=True)
