"""configs/README.md: the table of `key_table.py` as a page."""
from pangu_ms.errors import ConfigError
from pangu_ms.training.run.key_table import KEYS
from pangu_ms.training.run.keys import read_keys
from pangu_ms.yaml_keys import ANY, Applied, Refused, Section

BEGIN = """# The keys of a YAML file for training

`python tools/train.py --list-keys > configs/README.md` makes this page from the table that `pangu-train` checks files
against. A key of MindFormers 1.9 is here with what it does, or with the values that ask for nothing and the reason why
others are refused. Keys that are not here are refused too, with the nearest one's name. Sections of a class of yours,
which have `auto_register`, are handed on as they are. `openpangu_v2/README.md` tells of files for predict.

A mistake is one line, before anything slow begins:
"""
# What MindFormers' users have in their files, and what they mistype.
MISTAKES = (
    {"resume_training": True}, {"load_ckpt_format": "ckpt"}, {"swap_config": {"swap": True}},
    {"runner_config": {"sink_mode": True}}, {"recompute_config": {"select_recompute": True}},
    {"parallel_config": {"use_seq_parallel": True}}, {"parallel_config": {"micro_batch_num": 4}},
    {"parallel": {"enable_alltoall": True}}, {"callbacks": [{"type": "TrainingStateMonitor"}]},
    {"grouped_lr_schedule": {"default": {}}}, {"lr_schedule": {"type": "cosine", "lerning_rate": "4e-3"}},
    {"runner_config": {"batch_size": 4.5}}, {"optimizer": {"type": "AdamWW"}},
)


def page() -> str:
    lines = [BEGIN, *(f"    {_message(fields)}" for fields in MISTAKES)]
    lines += _section("The top of the file", {key: entry for key, entry in KEYS.items()
                                              if not isinstance(entry, Section)})
    for name, entry in KEYS.items():
        if isinstance(entry, Section):
            lines += _sections(name, entry)
    return "\n".join(lines) + "\n"


def _message(fields):
    try:
        read_keys(fields)
    except ConfigError as error:
        return str(error)
    raise AssertionError(f"{fields} is no mistake")


def _sections(name, section):
    lines = _section(f"`{name}`: {section.does}", section.keys)
    kinds = {}  # names of one class have one table
    for kind, table in (section.types or {}).items():
        kinds.setdefault(repr(_own(table)), []).append(kind)
    for names in kinds.values():
        table, said = _own(section.types[names[0]]), ", ".join(f"`{kind}`" for kind in names)
        if isinstance(table, dict):
            lines += ["", f"`type` {said}{':' if table else ', without keys'}", *_rows(table)]
        else:
            lines += ["", f"`type` {said}: " + (f"refused: {table.why}" if table else "whose class looks at its keys")]
    for key, entry in section.keys.items():
        if isinstance(entry, Section):
            lines += _sections(f"{name}.{key}", entry)
    return lines


def _own(table):
    """The table of a type without what it refuses, where that is a key of another type."""
    return {key: entry for key, entry in table.items() if isinstance(entry, Applied)} \
        if isinstance(table, dict) else table


def _section(title, table):
    return ["", f"## {title}", *_rows(table)]


def _rows(table):
    applied = {key: entry for key, entry in table.items() if isinstance(entry, Applied)}
    refused = {key: entry for key, entry in table.items() if isinstance(entry, Refused)}
    lines = []
    if applied:
        lines += ["", "| key | what it does | values |", "|---|---|---|"]
        lines += [f"| `{key}` | {entry.does}{' (needed)' if entry.needed else ''} | "
                  f"{'' if entry.kind is ANY else entry.kind.wanted} |" for key, entry in applied.items()]
    if refused:
        lines += ["", "| key | refused but at | because |", "|---|---|---|"]
        lines += [f"| `{key}` | {_off(entry)} | {entry.why} |" for key, entry in refused.items()]
    return lines


def _off(entry):
    return ", ".join("its defaults" if isinstance(value, dict) and value else f"`{value!r}`" for value in entry.off)
