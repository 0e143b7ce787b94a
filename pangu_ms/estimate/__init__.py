"""Size, memory, traffic and time of a run before any of it is spent: formulas over the config, without MindSpore."""
