"""Rank 1 is killed while rank 0 waits for it: killed.py OUTPUT, where it writes its process id."""
import os
import signal
import sys
from pathlib import Path

import mindspore as ms
from mindspore import ops

from pangu_ms.parallel import collectives
from pangu_ms.parallel.ranks import Ranks

place = collectives.start(Ranks(tensor=2))
total = collectives.reduce(place, "tensor")
total(ops.ones((2, 3), ms.float32)).asnumpy()                                   # they can hear each other
if place.rank == 1:
    Path(sys.argv[1]).write_text(str(os.getpid()))
    os.kill(os.getpid(), signal.SIGKILL)
total(ops.ones((2, 3), ms.float32)).asnumpy()
