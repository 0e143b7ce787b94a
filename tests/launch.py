"""Several processes, by MindSpore's launcher."""
import os
import socket
import subprocess
import sys
from pathlib import Path


def msrun(arguments, **options):
    """`subprocess.run` of msrun with these arguments, at a free port, with this Python and this source."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(Path(__file__).parents[1]), "GLOG_v": "3"}
    return subprocess.run(["msrun", f"--master_port={port}", *map(str, arguments)], env=environment, timeout=900,
                          **options)
