"""python tools/inspect_checkpoint.py DIR: what a checkpoint holds; --values, --diff DIR2, --json."""
import sys

from pangu_ms.checkpoint.inspect import main

sys.exit(main())
