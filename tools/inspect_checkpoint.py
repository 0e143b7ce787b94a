"""python tools/inspect_checkpoint.py DIR: what a checkpoint holds; --values, --diff DIR2, --json."""
import signal
import sys

from pangu_ms.checkpoint.inspect import main

signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
sys.exit(main())
