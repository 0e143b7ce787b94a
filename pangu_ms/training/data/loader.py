"""The data of a run as MindSpore draws it: packed sequences of a JSONL file, all epochs of it."""
from mindspore.dataset import GeneratorDataset

from pangu_ms.errors import ConfigError
from pangu_ms.text.tokenizer import Tokenizer
from pangu_ms.training.data.chats import read_chats
from pangu_ms.training.data.documents import read_texts
from pangu_ms.training.data.packing import PackedDataset
from pangu_ms.training.data.ramp import Steps

COLUMNS = ["input_ids", "labels", "loss_mask", "position_ids"]


class PanguJsonlLoader:
    """Packed sequences of a JSONL file, all epochs of it, in an order that `seed` and the epoch decide.

    Args:
        path: the file.
        tokenizer: a directory with a tokenizer, and a chat template for chats.
        seq_length: tokens in a sequence.
        documents: "texts" or "chats": what the lines hold, see `documents.py` and `chats.py`.
        seed: of the order; the run's where it is not given.
        min_document_length, max_document_length: tokens; documents with fewer or more are left out.
        epochs, tensor_parallel, num_shards, shard_id: from the trainer. Tensor parallel ranks get the same sequences.
    """

    def __new__(cls, path, tokenizer, seq_length, documents="texts", seed=0, epochs=1, tensor_parallel=1,
                num_shards=None, shard_id=None, min_document_length=None, max_document_length=None, **_):
        if documents not in ("texts", "chats"):
            raise ConfigError(f"train_dataset.data_loader.documents: found {documents!r}, wanted texts or chats")
        for key, value in (("min_document_length", min_document_length), ("max_document_length", max_document_length)):
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(f"train_dataset.data_loader.{key}: found {value!r}, wanted a number of tokens")
        read = read_texts if documents == "texts" else read_chats
        source = Epochs(read(path, Tokenizer(tokenizer)), seq_length, seed, epochs, min_document_length,
                        max_document_length)
        if num_shards is not None:
            num_shards, shard_id = num_shards // tensor_parallel, shard_id // tensor_parallel
            source.length -= source.length % num_shards                         # or some sequences would come again
        return GeneratorDataset(source, COLUMNS, shuffle=False, num_parallel_workers=1, python_multiprocessing=False,
                                num_shards=num_shards, shard_id=shard_id)


class Epochs:
    """The epochs of a `PackedDataset` one behind the other, so that a step's number says which sequences it has."""

    def __init__(self, documents, seq_length, seed, epochs, min_length=None, max_length=None):
        self.packed = PackedDataset(documents, seq_length, seed, min_length, max_length)
        self.length, self.largest_id = epochs * len(self.packed), documents.ids.max().item()

    def __len__(self):
        return self.length

    def __getitem__(self, n):
        return self.packed[int(n)]

    def documents(self, n):
        return self.packed.documents(n)


def source_of(dataset):
    """The Python object that a pipeline draws from, None when it is another kind of source."""
    while dataset.children:
        dataset = dataset.children[0]
    source = getattr(dataset, "source", None)
    return source_of(source.batches) if isinstance(source, Steps) else source
