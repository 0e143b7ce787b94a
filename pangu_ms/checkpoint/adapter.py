"""Adapter directories in PEFT's layout: adapter_config.json beside adapter_model.safetensors.

The tensors are float, and called as the base's in the Hugging Face layout: base_model.model.MODULE.lora_A.weight
[rank, columns] and lora_B.weight [rows, rank], for routed experts a pair each.
"""
import functools
import os

import numpy as np

from pangu_ms.architectures.adapters import LORA_A, LORA_B, Adapter, carries, module
from pangu_ms.architectures.fields import ADAPTER_CONFIG, Config
from pangu_ms.architectures.tensors import Parameter, parameters
from pangu_ms.checkpoint.directory import checkpoint_directory
from pangu_ms.checkpoint.dtypes import CARRIERS, to_float32
from pangu_ms.checkpoint.shards import StoredTensor, parse_json, read_header
from pangu_ms.errors import CheckpointError

ADAPTER_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
PLAIN = {  # fields of PEFT that change what a pair adds, and the value that leaves it as it is
    "use_dora": False, "use_rslora": False, "fan_in_fan_out": False, "bias": "none", "modules_to_save": None,
    "rank_pattern": {}, "alpha_pattern": {}, "lora_bias": False, "layer_replication": None,
}
FLOATS = ("F32", "F16", "BF16")


def peft_fields(adapter: Adapter, base: str) -> dict:
    """The contents of adapter_config.json. base: the directory of the model that the adapter belongs to."""
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
            "r": adapter.rank, "lora_alpha": adapter.alpha, "lora_dropout": adapter.dropout,
            "target_modules": adapter.target_modules, "init_lora_weights": True} | PLAIN


def by_source(arrays: dict[str, np.ndarray], config: Config) -> dict[str, np.ndarray]:
    """The tensors of an adapter under our names -> as adapter_model.safetensors has them; views.

    config: knows them, see `tensors.extended`.
    """
    known, found = parameters(config), {}
    for name, values in arrays.items():
        p = known[name]
        members = values if p.stacked else values[None]
        found |= {PREFIX + source: member for source, member in zip(p.sources, members)}
    return found


def by_name(arrays: dict[str, np.ndarray], config: Config) -> dict[str, np.ndarray]:
    """The inverse of `by_source`; tensors without a place keep their names."""
    left, found = dict(arrays), {}
    for p in parameters(config).values():
        sources = [PREFIX + source for source in p.sources]
        if all(source in left for source in sources):
            members = [left.pop(source) for source in sources]
            found[p.name] = np.stack(members) if p.stacked else members[0]
    return found | left


def read_peft_fields(directory: str) -> dict:
    """The contents of adapter_config.json, checked.

    Raises:
        CheckpointError: it is not there, damaged, or describes something else than a plain LoRA adapter.
    """
    path = os.path.join(directory, ADAPTER_CONFIG)
    try:
        with open(path, "rb") as file:
            fields = parse_json(path, file.read())
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path}: no such file; give a directory that pangu-train or PEFT has written an adapter "
                              "to, or such a training run") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if fields.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type: found {fields.get('peft_type')!r}, wanted 'LORA'")
    for name, plain in PLAIN.items():
        if fields.get(name, plain) not in (plain, None):
            raise CheckpointError(f"{path}: {name}: found {str(fields[name])[:80]!r}, wanted {plain!r}: this kind of "
                                  "LoRA is not implemented; merge it with PEFT")
    if type(fields.get("r")) is not int or fields["r"] < 1:
        raise CheckpointError(f"{path}: r: found {fields.get('r')!r}, wanted a positive integer")
    if type(fields.get("lora_alpha")) not in (int, float):
        raise CheckpointError(f"{path}: lora_alpha: found {fields.get('lora_alpha')!r}, wanted a number")
    return fields


class AdapterFiles:
    """An adapter open for reading, every tensor of which has its place in the base.

    Attributes:
        pairs: matrix of the base, (name of the parameter, member) -> A and B as they are stored.
        rank, scale: the product of a pair counts `scale`.
    """

    def __init__(self, directory: str | os.PathLike, config: Config):
        """Open a directory, or the newest checkpoint of a run, and check it.

        Raises:
            CheckpointError: a file is missing or damaged, or the adapter belongs to another model than `config` says.
        """
        self.directory = checkpoint_directory(directory)
        fields = read_peft_fields(self.directory)
        self.rank, self.scale = fields["r"], fields["lora_alpha"] / fields["r"]
        path = os.path.join(self.directory, ADAPTER_FILE)
        try:
            self.file = open(path, "rb", buffering=0)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from None
        try:
            self.pairs = self._pairs(read_header(self.file), config)
        except BaseException:
            self.close()
            raise
        self.pair = functools.lru_cache(4)(self._pair)                          # a matrix is asked for block by block

    def _pairs(self, stored: dict[str, StoredTensor], config: Config) -> dict[tuple[str, int], tuple]:
        found, problems, left = {}, [], dict(stored)
        for p in parameters(config).values():
            for member, source in enumerate(p.sources) if carries(p) else ():
                pair = [left.pop(f"{PREFIX}{module(source)}.{kind}", None) for kind in (LORA_A, LORA_B)]
                if pair == [None, None]:
                    continue
                if None in pair:
                    problems.append(f"{module(source)} lacks its {(LORA_A, LORA_B)[pair.index(None)]}")
                    continue
                for tensor, shape in zip(pair, ((self.rank, p.columns), (p.rows, self.rank))):
                    if tensor.shape != shape or tensor.dtype not in FLOATS:
                        problems.append(f"{tensor.name} is {tensor.dtype} {list(tensor.shape)}, wanted {list(shape)}")
                found[p.name, member] = tuple(pair)
        problems += [f"{name} has no place in it" for name in left]
        if problems or not found:
            raise CheckpointError(f"{self.file.name}: is no adapter of this model: "
                                  f"{problems[0] if problems else 'it holds no tensors'}"
                                  f"{f' (and {len(problems) - 1} more)' if problems[1:] else ''}; give the model that "
                                  f"{ADAPTER_CONFIG} names beside it")
        return found

    def _pair(self, p: Parameter, member: int) -> tuple[np.ndarray, np.ndarray]:
        """A [rank, columns] and B [rows, rank] of a matrix, float32."""
        return tuple(_read(tensor) for tensor in self.pairs[p.name, member])

    def close(self) -> None:
        self.file.close()


def _read(tensor: StoredTensor) -> np.ndarray:
    values = np.empty(tensor.shape, CARRIERS[tensor.dtype])
    tensor.read_into(0, memoryview(values).cast("B"))
    return to_float32(values, tensor.dtype)
