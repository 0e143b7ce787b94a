"""Draw the norm of the gradients of each layer of a deep network that was just initialised: as usual, and by Pangu
Ultra's recipe (post_norm_init: depth_scaled, initializer: tiny).

The network is dense and small: latent attention, norms on both sides of each sublayer, a plain residual. One batch of
random tokens gives the gradients.
"""
import argparse
import sys

import numpy as np

EXAMPLE = """example:
  python tools/plot_gradient_norms.py --out gradients.png --layers 48

48 layers take a minute or two to compile. Needs matplotlib: pip install pangu_ms[plot]
"""
RECIPES = {"as usual": {}, "depth_scaled, tiny": {"post_norm_init": "depth_scaled", "initializer": "tiny"}}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, metavar="FILE", help="the picture: .png, .svg or .pdf")
    parser.add_argument("--layers", type=int, default=48, metavar="L", help="of the network (default: 48)")
    arguments = parser.parse_args(argv)
    if arguments.layers < 1:
        parser.error("--layers: wanted at least 1")
    print("compiling", file=sys.stderr)
    norms = gradient_norms(arguments.layers)
    print("layer  " + "  ".join(norms))
    for layer, row in enumerate(zip(*norms.values())):
        print(f"{layer:5}  " + "  ".join(f"{value:{len(name)}.3e}" for name, value in zip(norms, row)))
    draw(norms, arguments.out)
    return 0


def gradient_norms(layers):
    """Recipe -> the norm of each layer's gradients, float [layers]. One compilation serves all."""
    import mindspore as ms

    from pangu_ms import PanguForCausalLM
    from pangu_ms.architectures.pangu_ultra_moe import PanguUltraMoEConfig
    from pangu_ms.training.initial_values import initialize
    from pangu_ms.training.objectives.pretraining import Pretraining
    from pangu_ms.training.objectives.settings import TrainingSettings
    from pangu_ms.training.step import Gradients
    model = PanguForCausalLM(PanguUltraMoEConfig(
        vocab_size=256, hidden_size=64, intermediate_size=192, num_hidden_layers=layers, num_dense_layers=layers,
        num_mtp_layers=0, num_attention_heads=4, attention_q_lora_dim=48, attention_kv_lora_dim=32, attention_qk_dim=16,
        attention_qk_rope_dim=16, attention_v_dim=16, rope_theta=1e4, max_position_embeddings=256))
    forward = Pretraining(model, TrainingSettings())
    weights = ms.ParameterTuple(forward.trained_parameters())
    gradients = Gradients(forward, weights)
    ids = np.random.default_rng(0).integers(0, 256, (4, 65)).astype(np.int32)
    position = np.tile(np.arange(64, dtype=np.int32), (4, 1))
    batch = [ms.Tensor(array) for array in (ids[:, :-1].copy(), ids[:, 1:].copy(), np.ones((4, 64), np.float32),
                                            position)]
    found = {}
    for name, settings in RECIPES.items():
        initialize(model, 0, TrainingSettings(**settings))
        squares = np.zeros(layers)
        for weight, gradient in zip(weights, gradients(*batch)[3]):
            if weight.name.startswith("model.layers."):
                squares[int(weight.name.split(".")[2])] += np.square(gradient.asnumpy(), dtype=np.float64).sum()
        found[name] = np.sqrt(squares)
    return found


def draw(norms, path):
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 4))
    panel = figure.add_subplot(xlabel="layer", ylabel="norm of its gradients", yscale="log")
    for name, values in norms.items():
        panel.plot(values, label=name)
    panel.legend()
    figure.savefig(path, bbox_inches="tight")


if __name__ == "__main__":
    sys.exit(main())
