"""python tools/estimate.py --config FILE ...: memory, operations, traffic and time of a run, before it is run."""
import signal
import sys

from pangu_ms.estimate.command import main

signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
sys.exit(main())
