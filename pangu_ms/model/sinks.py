"""Learned sinks: rows that every query sees, in front of the keys, and that no position counts."""
from mindspore import ops


def with_sinks(visible, sinks):
    """bool [B, T, S] -> [B, T, 1, sinks + S]: the sinks, in front of the keys, are seen by every query."""
    if sinks == 0:
        return ops.expand_dims(visible, 2)
    always = ops.ones(visible.shape[:2] + (sinks,), visible.dtype)
    return ops.expand_dims(ops.cat((always, visible), 2), 2)


def behind_sinks(sinks, rows):
    """Rows [B, S, ...] behind the sinks [S0, ...] -> [B, S0 + S, ...]; themselves where sinks is None."""
    if sinks is None:
        return rows
    return ops.cat((ops.tile(ops.expand_dims(sinks, 0), (rows.shape[0],) + (1,) * sinks.ndim), rows), 1)
