"""Gradients of networks of grouped queries, one whose head is the embedding and one of grouped experts, against
differences of a float64 forward."""
import mindspore as ms
import numpy as np
import pytest

from pangu_ms.training.objectives.pretraining import Pretraining
from pangu_ms.training.objectives.settings import TrainingSettings
from pangu_ms.training.step import Gradients

STEP = 1e-4  # of a tensor's values, where differences of float64 are good to eight digits


@pytest.mark.parametrize("name", ["embedded_tied", "pro_moe"])
def test_every_tensor_has_the_gradient_that_differences_say(model, golden, name):
    """Of grouped experts with a balance loss that shows."""
    network, ids = model(name), golden(name, "T24")["ids"]
    moe = network.plan.layers[0].feed_forward if name == "pro_moe" else None
    forward = Pretraining(network, TrainingSettings(balance_loss_coeff=0.3))
    assert forward.part_names == (("lm", "balance") if moe else ("lm",))
    weights = ms.ParameterTuple(forward.trained_parameters())
    inputs, labels = ids[:, :-1].copy(), ids[:, 1:].copy()
    position = np.arange(23, dtype=np.int32)[None]
    total, _, _, gradients = Gradients(forward, weights)(*map(ms.Tensor, (
        inputs, labels, np.ones(inputs.shape, np.float32), position)))
    values = {parameter.name: parameter.asnumpy().astype(np.float64) for parameter in weights}
    assert abs(total.asnumpy() - loss(network.config, values, inputs[0], labels[0], moe)) < 2e-5
    draw = np.random.default_rng(0)
    for parameter, gradient in zip(weights, gradients):
        name, found = parameter.name, gradient.asnumpy().astype(np.float64)
        # Along the gradient itself, where the difference is largest, and along a random direction.
        for way in (found / np.linalg.norm(found), draw.standard_normal(found.shape)):
            ends = [loss(network.config, values | {name: values[name] + sign * STEP * way}, inputs[0], labels[0], moe)
                    for sign in (1, -1)]
            wanted = (ends[0] - ends[1]) / (2 * STEP)
            assert abs((found * way).sum() - wanted) < 2e-5 * np.linalg.norm(found) * np.linalg.norm(way), name


def loss(config, values, ids, labels, moe):
    """ids and labels [T] -> the mean cross entropy, and 0.3 times the mean balance loss where experts are grouped, all
    in float64."""
    def norm(x, name):
        return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + config.rms_norm_eps) * values[f"{name}.weight"]

    def project(x, name):
        return x @ values[f"{name}.weight"].T + values[f"{name}.bias"]

    heads, width, length = config.num_attention_heads, config.head_width, len(ids)
    angle = np.arange(length)[:, None] * config.rope_theta ** (-np.arange(0, width, 2) / width)
    cos, sin = np.cos(angle), np.sin(angle)

    def by_head(x, rotated):
        x = x.reshape(length, -1, width).transpose(1, 0, 2)                     # [heads, T, width]
        if rotated:
            a, b = x[..., :width // 2], x[..., width // 2:]
            x = np.concatenate((a * cos - b * sin, b * cos + a * sin), -1)
        return np.repeat(x, heads // len(x), 0)                                 # head n reads n // (N / G)

    def swiglu(h, name, expert=np.s_[:]):
        gate, up, down = (values[f"{name}.{one}_proj.weight"][expert] for one in ("gate", "up", "down"))
        return h @ gate.T / (1 + np.exp(-(h @ gate.T))) * (h @ up.T) @ down.T

    def experts(h, name):
        score = np.exp(h @ values[f"{name}.gate.weight"].T)
        score /= score.sum(-1, keepdims=True)                                   # [T, E]
        groups = score.reshape(length, moe.groups, -1)
        chosen = groups.argmax(-1) + np.arange(moe.groups) * groups.shape[2]    # [T, K]
        y = swiglu(h, f"{name}.shared_expert")
        for t, e in np.ndindex(chosen.shape):
            e = chosen[t, e]
            y[t] += score[t, e] * values[f"{name}.router_scale"][0, e] * swiglu(h[t], f"{name}.experts", e)
        counts = np.bincount(chosen.ravel(), minlength=score.shape[1])
        return y, (score.shape[1] / chosen.size * counts * score.mean(0)).sum()

    balance, x = 0, values["model.embed_tokens.weight"][ids]
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}."
        h = norm(x, layer + "input_layernorm")
        q, k, v = (by_head(project(h, f"{layer}self_attn.{one}_proj"), one != "v") for one in "qkv")
        score = np.where(np.tri(length, dtype=bool), q @ k.transpose(0, 2, 1) * width ** -0.5, -np.inf)
        prob = np.exp(score - score.max(-1, keepdims=True))
        out = (prob / prob.sum(-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(length, -1)
        x = x + project(out, layer + "self_attn.o_proj")
        h = norm(x, layer + "post_attention_layernorm")
        y, uneven = experts(h, layer + "mlp") if moe else (swiglu(h, layer + "mlp"), 0)
        x, balance = x + y, balance + uneven / config.num_hidden_layers
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    logits = norm(x, "model.norm") @ values[head].T
    logits -= logits.max(-1, keepdims=True)
    return np.mean(np.log(np.exp(logits).sum(-1)) - logits[np.arange(length), labels]) + 0.3 * balance
