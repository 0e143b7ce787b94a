"""Write a model with random weights, as a Hugging Face checkpoint directory.

Its text means nothing, its speed and memory are those of a trained model of the same sizes. Weights are drawn so that
what passes through the network neither grows nor fades: matrices from normal(0, 1 / columns), norms around one.
"""
import argparse
import dataclasses
import json
import os
import shutil
import sys
import zlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pangu_ms.architectures import config_from_dict
from pangu_ms.architectures.fields import CONFIG_FILE, Config
from pangu_ms.architectures.openpangu_v2 import PanguConfig
from pangu_ms.architectures.pangu_embedded import PanguEmbeddedConfig
from pangu_ms.architectures.tensors import (
    ALPHA, EMBEDDING, FLOAT32, ONE, POST_ATTENTION_NORM, POST_MLP_NORM, STREAM_GATES, ZERO,
)
from pangu_ms.checkpoint.dtypes import CODES, from_float32
from pangu_ms.checkpoint.layout import LayoutTensor, released
from pangu_ms.checkpoint.shards import INDEX_FILE
from pangu_ms.conversion.plan import SHARD_SIZE, into_shards
from pangu_ms.errors import PanguError, one_line
from pangu_ms.yaml_file import check_section

EXAMPLE = """examples:
  python tools/make_model.py /tmp/small --preset small
  python tools/make_model.py /tmp/half --preset small --set num_hidden_layers=4 --set dsa_layers=[0] \\
      --set swa_layers=[1,2,3] --set sliding_window_list=null --set block_post_layernorm_idx=[3]

presets:
  tiny   every path of the model, as small as they come (tests/data/tiny)
  toy    the toy's sizes (examples/toy)
  small  197 million parameters, the model of docs/measured.md: 8 layers, 64 experts, contexts to 65,536
  deep   the pattern of openPangu-2.0-Flash's 46 + 3 layers at tiny's widths
  embedded_1b   openPangu Embedded 1B, whole

A value is JSON, or a text as it stands. The number format is the config's: --set dtype=bfloat16.
"""
ROOT = Path(__file__).parents[1]
SMALL = {
    "hidden_size": 512, "num_hidden_layers": 8, "num_nextn_predict_layers": 0, "num_attention_heads": 8,
    "num_key_value_heads": 8, "q_lora_rank": 256, "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32,
    "v_head_dim": 64, "n_routed_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 256,
    "intermediate_size": 1024, "vocab_size": 8192, "dsa_layers": [0, 4], "swa_layers": [1, 2, 3, 5, 6, 7],
    "sliding_window": 128, "sliding_window_list": [128] * 6, "index_topk": 256, "index_n_heads": 4,
    "index_head_dim": 64, "param_sink_number": 16, "max_position_embeddings": 65536, "first_k_dense_replace": 1,
    "block_post_layernorm_idx": [3, 7],
}
FLASH_PATTERN = ("num_hidden_layers", "num_nextn_predict_layers", "dsa_layers", "swa_layers", "first_k_dense_replace",
                 "block_post_layernorm_idx")
DEEP = {name: getattr(PanguConfig.flash_92b(), name) for name in FLASH_PATTERN} | {"sliding_window_list": None}
EMBEDDED_1B = PanguEmbeddedConfig.embedded_1b(dtype="float32").to_dict()
PRESETS = {  # the config to start from, and what is different
    "tiny": ("tests/data/tiny", {}), "toy": ("examples/toy", {}), "small": ("tests/data/tiny", SMALL),
    "deep": ("tests/data/tiny", DEEP), "embedded_1b": ("tests/data/embedded_tied", EMBEDDED_1B),
}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", help="directory to make; must not exist, or be empty")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="tiny", help="sizes to start from (default: tiny)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a field of config.json")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the weights (default: 0)")
    arguments = parser.parse_args(argv)
    if arguments.seed < 0:
        parser.error(f"--seed is {arguments.seed}: wanted at least 0")
    try:
        config = make_config(arguments.preset, arguments.set)
        size = write_model(arguments.out, config, lambda tensor: [drawn_bytes(tensor, arguments.seed)])
    except PanguError as error:
        print(f"make_model.py: error: {one_line(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"make_model.py: error: {error.filename or arguments.out}: {error.strerror}", file=sys.stderr)
        return 2
    print(f"{arguments.out}: {config.parameter_count()['trunk_and_mtp'] / 1e6:.1f} million parameters, "
          f"{size / 1e6:,.1f} MB")
    return 0


def make_config(preset: str, changes: list[str]) -> Config:
    """The config of a preset with `KEY=VALUE` of --set; `ConfigError` names an unknown key, or what contradicts."""
    base, fields = PRESETS[preset]
    fields = json.loads((ROOT / base / CONFIG_FILE).read_text(encoding="utf-8")) | fields
    known = config_from_dict(fields).given_fields()
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise PanguError(f"--set {change}: wanted KEY=VALUE, as in --set num_hidden_layers=4")
        check_section("--set", [name], known)
        try:
            fields[name] = json.loads(value)
        except ValueError:
            fields[name] = value
        if name in ("dtype", "torch_dtype"):  # two names of one field
            fields |= {"dtype": fields[name], "torch_dtype": fields[name]}
    return config_from_dict(fields)


def draw(tensor: LayoutTensor, seed: int) -> np.ndarray:
    """The values of one tensor, float32, from the seed and its name alone. A repetition of another has that one's."""
    p = tensor.parameter
    generator = np.random.default_rng([seed, zlib.crc32(own_name(tensor).encode())])
    values = generator.standard_normal(tensor.shape, np.float32)
    if p.initial in (ONE, POST_ATTENTION_NORM, POST_MLP_NORM):
        return 1 + 0.1 * values
    if p.initial in (ZERO, ALPHA, STREAM_GATES):  # convolutions, biases, gates: as if they had learned a little
        return 0.1 * values
    return values if p.initial == EMBEDDING else values / np.sqrt(p.columns, dtype=np.float32)


def drawn_bytes(tensor: LayoutTensor, seed: int) -> memoryview:
    return from_float32(draw(tensor, seed), tensor.dtype)[0].data


def own_name(tensor: LayoutTensor) -> str:
    """Its name, or of one that repeats another that one's."""
    return tensor.name if tensor.name in tensor.parameter.sources else tensor.parameter.name


def write_model(directory: str | os.PathLike, config: Config, blocks, shard_size: int = SHARD_SIZE) -> int:
    """Write a checkpoint of the release's layout, all of it or nothing -> bytes of its tensors.

    Args:
        blocks: from a tensor to its bytes, in blocks.

    Raises:
        PanguError: there is something in the directory's place.
    """
    directory = Path(directory)
    if directory.is_symlink() or directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise PanguError(f"{directory}: is there already, and nothing is written over; name another directory")
    partial = directory.with_name(f"{directory.name}.partial")
    try:
        partial.mkdir(parents=True)
    except FileExistsError:
        raise PanguError(f"{partial}: another run is writing it, or has left it; wait for that, or remove it") from None
    try:
        size = _write(partial, config, blocks, shard_size)
        os.rename(partial, directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return size


def _write(directory, config, blocks, shard_size):
    config.save_pretrained(directory)
    code, weight_map = CODES[config.dtype or "float32"], {}
    tensors = [dataclasses.replace(tensor, dtype="F32" if tensor.parameter.note == FLOAT32 else code)
               for tensor in released(config, config.tensors.copies_known)]
    size = sum(tensor.nbytes for tensor in tensors)
    with tqdm(desc="writing", total=size, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        for shard in into_shards(tensors, shard_size):
            with open(directory / shard.name, "wb") as file:
                file.write(shard.header)
                for tensor in shard.tensors:
                    for block in blocks(tensor):
                        file.write(block)
                    weight_map[tensor.name] = shard.name
                    bar.update(tensor.nbytes)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return size


if __name__ == "__main__":
    sys.exit(main())
