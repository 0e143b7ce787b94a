"""python tools/convert_ms_to_hf.py: pangu-convert ms2hf with the flags that MindFormers' converters take."""
import sys

from pangu_ms.conversion.command import main_with_flags

sys.exit(main_with_flags("ms2hf"))
