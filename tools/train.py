"""python tools/train.py: the command pangu-train without its installed name."""
import sys

from pangu_ms.training.run.command import main

sys.exit(main())
