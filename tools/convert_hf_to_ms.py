"""python tools/convert_hf_to_ms.py: pangu-convert hf2ms with the flags that MindFormers' converters take."""
import sys

from pangu_ms.conversion.command import main_with_flags

sys.exit(main_with_flags("hf2ms"))
