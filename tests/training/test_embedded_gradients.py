"""Gradients of a network of grouped queries, whose head is the embedding, against differences of a float64 forward."""
import mindspore as ms
import numpy as np

from pangu_ms.training.objectives.pretraining import Pretraining
from pangu_ms.training.objectives.settings import TrainingSettings
from pangu_ms.training.step import Gradients

STEP = 1e-4  # of a tensor's values, where differences of float64 are good to eight digits


def test_every_tensor_has_the_gradient_that_differences_say(model, golden):
    network, ids = model("embedded_tied"), golden("embedded_tied", "T24")["ids"]
    forward = Pretraining(network, TrainingSettings())
    weights = ms.ParameterTuple(forward.trained_parameters())
    inputs, labels = ids[:, :-1].copy(), ids[:, 1:].copy()
    position = np.arange(23, dtype=np.int32)[None]
    total, _, _, gradients = Gradients(forward, weights)(*map(ms.Tensor, (
        inputs, labels, np.ones(inputs.shape, np.float32), position)))
    values = {parameter.name: parameter.asnumpy().astype(np.float64) for parameter in weights}
    assert abs(total.asnumpy() - loss(network.config, values, inputs[0], labels[0])) < 2e-5
    draw = np.random.default_rng(0)
    for parameter, gradient in zip(weights, gradients):
        name, found = parameter.name, gradient.asnumpy().astype(np.float64)
        # Along the gradient itself, where the difference is largest, and along a random direction.
        for way in (found / np.linalg.norm(found), draw.standard_normal(found.shape)):
            ends = [loss(network.config, values | {name: values[name] + sign * STEP * way}, inputs[0], labels[0])
                    for sign in (1, -1)]
            wanted = (ends[0] - ends[1]) / (2 * STEP)
            assert abs((found * way).sum() - wanted) < 2e-5 * np.linalg.norm(found) * np.linalg.norm(way), name


def loss(config, values, ids, labels):
    """ids and labels [T] -> the mean cross entropy, all in float64."""
    def norm(x, name):
        return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + config.rms_norm_eps) * values[f"{name}.weight"]

    def project(x, name, bias=True):
        return x @ values[f"{name}.weight"].T + (values[f"{name}.bias"] if bias else 0)

    heads, width, length = config.num_attention_heads, config.head_width, len(ids)
    angle = np.arange(length)[:, None] * config.rope_theta ** (-np.arange(0, width, 2) / width)
    cos, sin = np.cos(angle), np.sin(angle)

    def by_head(x, rotated):
        x = x.reshape(length, -1, width).transpose(1, 0, 2)                     # [heads, T, width]
        if rotated:
            a, b = x[..., :width // 2], x[..., width // 2:]
            x = np.concatenate((a * cos - b * sin, b * cos + a * sin), -1)
        return np.repeat(x, heads // len(x), 0)                                 # head n reads n // (N / G)

    x = values["model.embed_tokens.weight"][ids]
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}."
        h = norm(x, layer + "input_layernorm")
        q, k, v = (by_head(project(h, f"{layer}self_attn.{one}_proj"), one != "v") for one in "qkv")
        score = np.where(np.tri(length, dtype=bool), q @ k.transpose(0, 2, 1) * width ** -0.5, -np.inf)
        prob = np.exp(score - score.max(-1, keepdims=True))
        out = (prob / prob.sum(-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(length, -1)
        x = x + project(out, layer + "self_attn.o_proj")
        h = norm(x, layer + "post_attention_layernorm")
        gate, up = (project(h, f"{layer}mlp.{one}_proj", False) for one in ("gate", "up"))
        x = x + project(gate / (1 + np.exp(-gate)) * up, layer + "mlp.down_proj", False)
    logits = norm(x, "model.norm") @ values["model.embed_tokens.weight"].T
    logits -= logits.max(-1, keepdims=True)
    return np.mean(np.log(np.exp(logits).sum(-1)) - logits[np.arange(length), labels])
