"""python tools/generate.py: the command pangu-generate without its installed name."""
import sys

from pangu_ms.generation.command import main

sys.exit(main())
