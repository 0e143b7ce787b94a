"""A fused projection, normed keys and sinks: gradients of one attention against differences of a float64 forward."""
import mindspore as ms
import numpy as np
from mindspore import nn, ops

from pangu_ms import device
from pangu_ms.architectures.pangu_pro_moe_v2 import PanguProMoEV2Config
from pangu_ms.model.grouped_query_attention import GroupedQueryAttention
from pangu_ms.model.step_info import StepInfo
from pangu_ms.parallel.ranks import Ranks

LENGTH, HEADS, GROUPS, NOPE, ROPE, VALUE, SINKS = 9, 6, 2, 5, 4, 3, 2
WIDTH = NOPE + ROPE
CONFIG = PanguProMoEV2Config(
    vocab_size=8, hidden_size=7, intermediate_size=4, num_hidden_layers=1, num_attention_heads=HEADS,
    num_key_value_heads=GROUPS, qk_nope_dim=NOPE, qk_rope_dim=ROPE, v_channels=VALUE, param_sink_number=SINKS,
    mlp_only_layers=(0,), num_mtp_layers=0, max_position_embeddings=64, rope_theta=100.0, bos_token_id=None,
    eos_token_id=None, pad_token_id=None)
STEP = 1e-4  # of a tensor's values, where differences of float64 are good to eight digits


class Weighted(nn.Cell):
    """x [1, T, H], weight [1, T, H] -> the weighted sum of what attention gives."""

    def __init__(self, attention):
        super().__init__()
        self.attention, self.step_info = attention, StepInfo(CONFIG.plan, CONFIG.plan.layers)

    def construct(self, x, position, weight):
        y, _, _ = self.attention(x, self.step_info(position, None, False, False), None)
        return ops.sum(y * weight)


def test_every_tensor_has_the_gradient_that_differences_say():
    device.start()
    draw = np.random.default_rng(0)
    attention = GroupedQueryAttention(CONFIG.plan.layers[0].attention, CONFIG.plan, Ranks())
    for parameter in attention.get_parameters():
        parameter.set_data(ms.Tensor(draw.normal("norm" in parameter.name, 0.5, parameter.shape).astype(np.float32)))
    weights = ms.ParameterTuple(attention.get_parameters())
    x, weight = (draw.normal(size=(1, LENGTH, 7)).astype(np.float32) for _ in range(2))
    position = np.arange(LENGTH, dtype=np.int32)[None]
    total, gradients = ms.value_and_grad(Weighted(attention), 0, weights)(*map(ms.Tensor, (x, position, weight)))
    names = ["x", *(parameter.name.split(".", 1)[-1] for parameter in weights)]
    assert set(names) == {"x", "qkv_proj.weight", "o_proj.weight", "k_layernorm.weight", "param_sink_key",
                          "param_sink_value"}
    values = dict(zip(names, (each.astype(np.float64) for each in (x, *(each.asnumpy() for each in weights)))))
    assert abs(total.asnumpy() - forward(values, weight)) < 1e-5
    for name, gradient in zip(names, (gradients[0], *gradients[1])):
        found = gradient.asnumpy().astype(np.float64)
        for way in (found / np.linalg.norm(found), draw.standard_normal(found.shape)):
            ends = [forward(values | {name: values[name] + sign * STEP * way}, weight) for sign in (1, -1)]
            wanted = (ends[0] - ends[1]) / (2 * STEP)
            assert abs((found * way).sum() - wanted) < 2e-5 * np.linalg.norm(found) * np.linalg.norm(way), name


def forward(values, weight):
    """Section 4 of the family, one query at a time, in float64."""
    rows = values["x"][0] @ values["qkv_proj.weight"].T
    q, k, v = np.split(rows, (HEADS * WIDTH, (HEADS + GROUPS) * WIDTH), 1)
    q, k, v = q.reshape(LENGTH, HEADS, WIDTH), normed(k.reshape(LENGTH, GROUPS, WIDTH), values), v.reshape(
        LENGTH, GROUPS, VALUE)
    q, k = rotated(q), rotated(k)
    sinks, total = normed(values["param_sink_key"], values), 0
    for t in range(LENGTH):
        heads = []
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            keys = np.concatenate((sinks[:, group], k[:t + 1, group]))
            score = np.exp(keys @ q[t, head] * WIDTH ** -0.5)
            heads.append(score @ np.concatenate((values["param_sink_value"][:, group], v[:t + 1, group])) / score.sum())
        total += weight[0, t] @ (values["o_proj.weight"] @ np.concatenate(heads))
    return total


def normed(keys, values):
    return keys / np.sqrt((keys ** 2).mean(-1, keepdims=True) + CONFIG.rms_norm_eps) * values["k_layernorm.weight"]


def rotated(x):
    """[T, heads, WIDTH], of which neighbours among the first ROPE are turned as complex numbers."""
    angle = np.arange(LENGTH)[:, None, None] * CONFIG.rope_theta ** (-np.arange(0, ROPE, 2) / ROPE)
    turned = (x[..., 0:ROPE:2] + 1j * x[..., 1:ROPE:2]) * np.exp(1j * angle)
    pairs = np.stack((turned.real, turned.imag), -1).reshape(*x.shape[:2], ROPE)
    return np.concatenate((pairs, x[..., ROPE:]), -1)
