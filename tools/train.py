"""python tools/train.py: the command pangu-train without its installed name."""
import sys

from pangu_ms.training.command import main

sys.exit(main())
