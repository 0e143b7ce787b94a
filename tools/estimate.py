"""python tools/estimate.py --config FILE ...: memory, operations, traffic and time of a run, before it is run."""
import sys

from pangu_ms.estimate.command import main

sys.exit(main())
