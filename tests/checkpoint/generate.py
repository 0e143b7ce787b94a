"""Checkpoints for tests, made from a seed: any config, dtype and number of shards, in the release's layout.

Writes safetensors by itself, so that tests compare the package with something it did not write.
"""
import json
import struct
from pathlib import Path

import numpy as np

from pangu_ms.architectures import config_from_dict
from pangu_ms.architectures.fields import Config
from pangu_ms.architectures.tensors import FLOAT32, INT8, mtp_copies, parameters

CODES = {"<f4": "F32", "<f2": "F16", "<u2": "BF16", "|i1": "I8"}
# Even numbers of heads, experts, rows and tokens, so that 2 and 4 ranks can share the model.
SLICEABLE = {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 200, "n_routed_experts": 8}
# A dense layer, one with experts and an MTP layer, so small that a conversion takes a few milliseconds.
SMALL = {"num_hidden_layers": 2, "num_nextn_predict_layers": 1, "dsa_layers": [0], "swa_layers": [1],
         "sliding_window_list": [7], "block_post_layernorm_idx": [1], "n_routed_experts": 2, "num_experts_per_tok": 1,
         "vocab_size": 16, "hidden_size": 8}


def config(data: Path, **changes) -> Config:
    """The tiny golden config with some fields changed."""
    return config_from_dict(json.loads((data / "tiny" / "config.json").read_text()) | changes)


def tensors(config: Config, dtype: str = "bfloat16", seed: int = 0, int8: bool = False) -> dict[str, np.ndarray]:
    """Random tensors under the release's names; bfloat16 as uint16, what must stay float32 in float32."""
    random = np.random.default_rng(seed)

    def draw(shape):
        values = random.standard_normal(shape, np.float32)
        if dtype == "bfloat16":
            return (values.view(np.uint32) >> 16).astype("<u2")
        return values.astype({"float32": "<f4", "float16": "<f2"}[dtype])

    found = {}
    for p in parameters(config).values():
        for source in p.sources:
            if int8 and p.note == INT8:
                found[source] = random.integers(-127, 128, p.member_shape, np.int8)
                found[f"{source}_scale"] = draw((p.rows, 1))
            elif p.note == FLOAT32:
                found[source] = random.standard_normal(p.member_shape, np.float32)
            else:
                found[source] = draw(p.member_shape)
    return found | {copy: found[original] for copy, original in mtp_copies(config).items()}


def write_file(path: Path, found: dict[str, np.ndarray]) -> None:
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, values in found.items():
        header[name] = {"dtype": CODES[values.dtype.str], "shape": list(values.shape),
                        "data_offsets": [offset, offset + values.nbytes]}
        offset += values.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(v.tobytes() for v in found.values()))


def write(directory: Path, config: Config, found: dict[str, np.ndarray], shards: int = 1) -> Path:
    """A directory with config.json, `shards` files that the tensors are dealt to in turn, and an index."""
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(directory)
    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(found.items())[shard::shards])
        write_file(directory / name, part)
        weight_map |= dict.fromkeys(part, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def read(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of all *.safetensors files of a directory as (dtype, shape, bytes), by name."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        raw = path.read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8:8 + length])
        header.pop("__metadata__", None)
        for name, fields in header.items():
            assert name not in found
            start, end = (8 + length + o for o in fields["data_offsets"])
            found[name] = (fields["dtype"], tuple(fields["shape"]), raw[start:end])
    return found
