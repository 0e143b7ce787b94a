"""From one sublayer to the next: reading its input off the residual stream, putting its output back.

A residual is plain, stream [B, T, H] and x + f(x), or of several streams [B, T, N, H] joined by hyper-connections
(section 3). `gates` of a sublayer is what tells: None, or the gates of its hyper-connection.
"""
from pangu_ms.device import replaceable
from pangu_ms.model.hyper_connection import mhc_post, mhc_pre
from pangu_ms.model.norm import rms_norm


@replaceable
def residual_pre(stream, gates, norm, step):
    """The normed input of a sublayer [B, T, H], and what `residual_post` needs to put its output back."""
    if gates is None:
        return rms_norm(stream, norm), ()
    x, post, residual_mix = mhc_pre(stream, gates)
    return rms_norm(x, norm), (post, residual_mix)


@replaceable
def residual_post(y, norm, back, stream, step):
    """A sublayer's output y [B, T, H], normed unless norm is None, back onto the stream it was read from -> the new
    stream."""
    if norm is not None:
        y = rms_norm(y, norm)
    if len(back) == 0:
        return stream + y
    post, residual_mix = back
    return mhc_post(y, post, residual_mix, stream)


@replaceable
def residual_post_pre(y, norm, back, stream, next_gates, next_norm, step):
    """`residual_post`, then `residual_pre` of the next sublayer -> the new stream, x, back."""
    stream = residual_post(y, norm, back, stream, step)
    x, back = residual_pre(stream, next_gates, next_norm, step)
    return stream, x, back
