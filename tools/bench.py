"""Measurements that the documentation quotes.

  python tools/make_model.py /tmp/small --preset small
  python tools/bench.py generate --model /tmp/small --plot contexts.png
  python tools/bench.py train --config configs/openpangu_v2/pretrain_toy_cpu.yaml
  python tools/bench.py convert --directory /tmp

`python tools/bench.py NAME --help` says what is measured, and how.
"""
import argparse
import json
import os
import sys

import bench_convert
import bench_generate
import bench_train
from pangu_ms.errors import PanguError, one_line

TOOLS = {"convert": bench_convert, "generate": bench_generate, "train": bench_train}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, tool in TOOLS.items():
        command = commands.add_parser(name, help=tool.__doc__.partition(".")[0], description=tool.__doc__,
                                      formatter_class=argparse.RawDescriptionHelpFormatter)
        tool.add_arguments(command)
        command.add_argument("--json", action="store_true", help="print one JSON object instead of the report")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("GLOG_v", "3")  # MindSpore's own log: errors only
    tool = TOOLS[arguments.command]
    try:
        found = tool.measure(arguments)
    except PanguError as error:
        print(f"bench.py: error: {one_line(error)}", file=sys.stderr)
        return 2
    print(json.dumps(found) if arguments.json else tool.report(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
