"""The data of a run as MindSpore draws it: packed sequences of files, all epochs of them."""
import logging

import numpy as np
from mindspore.dataset import GeneratorDataset

from pangu_ms.errors import ConfigError, PanguError
from pangu_ms.text.tokenizer import Tokenizer
from pangu_ms.training.data.blending import Blend, read_data_path
from pangu_ms.training.data.chats import read_chats
from pangu_ms.training.data.documents import read_texts, special_id
from pangu_ms.training.data.indexed import read_indexed
from pangu_ms.training.data.packing import COLUMNS, PackedDataset
from pangu_ms.training.data.ramp import Steps

logger = logging.getLogger(__name__)


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
        check_kind(documents)
        read = read_texts if documents == "texts" else read_chats
        source = Epochs([read(path, Tokenizer(tokenizer))], [1], seq_length, seed, epochs,
                        (min_document_length, max_document_length))
        return as_dataset(source, tensor_parallel, num_shards, shard_id)


class PanguIndexedLoader:
    """Packed sequences of corpora in Megatron's .bin and .idx files, which tools/tokenize_corpus.py makes. Of the same
    documents, tokenizer and seed they are those of `PanguJsonlLoader`.

    Args:
        data_path: the path of .bin and .idx without these endings, or a list of weights and such paths in turn. The
            weights are the shares of the sequences that come from each, see `blending.py`. An epoch has as many
            sequences as one epoch of each corpus; a corpus that runs out before begins again in another order.
        tokenizer: a directory with the tokenizer that made them. Its end token pads; checkpoints get a copy.
        seq_length: tokens in a sequence.
        documents: "texts" or "chats": what the corpora hold, see `indexed.py`.
        seed: of the order; the run's where it is not given.
        min_document_length, max_document_length: tokens; documents with fewer or more are left out.
        epochs, tensor_parallel, num_shards, shard_id: from the trainer. Tensor parallel ranks get the same sequences.
    """

    def __new__(cls, data_path, tokenizer, seq_length, documents="texts", seed=0, epochs=1, tensor_parallel=1,
                num_shards=None, shard_id=None, min_document_length=None, max_document_length=None, **_):
        check_kind(documents)
        pad_id = special_id(Tokenizer(tokenizer), "eos_token")
        weights, prefixes = zip(*read_data_path(data_path))
        source = Epochs([read_indexed(prefix, documents, pad_id) for prefix in prefixes], weights, seq_length, seed,
                        epochs, (min_document_length, max_document_length))
        if len(prefixes) > 1:
            logger.warning("the run has %s", ", ".join(f"each sequence of {prefix} {count:.2f} times"
                                                       for prefix, count in zip(prefixes, source.repeats())))
        return as_dataset(source, tensor_parallel, num_shards, shard_id)


class Epochs:
    """All sequences of a run, one behind the other, so that a step's number says which ones it has.

    Args:
        sources: the `Documents` of each corpus.
        weights: which share of the sequences each corpus has, see `Blend`.
        sequence_length, seed: see `PackedDataset`.
        epochs: of all corpora together.
        lengths: the fewest and the most tokens of the documents that are read, as far as there are such bounds.

    Attributes:
        first: the number of the sequence that reading begins with; those before it are not read.
        largest_id (int): of all tokens, as far as it is known without reading them.
        vocab_size: tokens beyond it are refused when their sequence is read.
        error (PanguError | None): what reading a sequence raised. MindSpore hands on its text, in a traceback.
    """

    first, vocab_size, error = 0, None, None

    def __init__(self, sources, weights, sequence_length, seed, epochs, lengths=(None, None)):
        self.packed = [PackedDataset(documents, sequence_length, seed, *lengths) for documents in sources]
        self.blend, self.length = Blend(weights), epochs * sum(map(len, self.packed))
        self.largest_id = max(-1 if documents.largest_id is None else documents.largest_id for documents in sources)

    def __len__(self):
        return self.length

    def __getitem__(self, n):
        n = self.first + int(n)
        source, place = self.blend.place(n)
        sequence = self.packed[source][place]
        try:
            self._check(n, sequence)
        except PanguError as error:
            self.error = error
            raise
        return sequence

    def documents(self, n):
        """The names of the documents of sequence n of the run."""
        source, place = self.blend.place(n)
        return self.packed[source].documents(place)

    def repeats(self):
        """How often the run has each sequence of each corpus, on average."""
        return [share * self.length / len(packed) for share, packed in zip(self.blend.shares, self.packed)]

    def _check(self, n, sequence):
        """`PanguError` names a token that the model does not have, or a mask that is none."""
        ids = np.stack([sequence.input_ids, sequence.labels])
        wrong = (ids < 0) | (ids >= (self.vocab_size or np.inf))
        if wrong.any():
            place = wrong.any(axis=0).argmax()
            begun = np.count_nonzero(sequence.position_ids[:place + 1] == 0)
            token = ids[:, place][wrong[:, place]][0]
            raise PanguError(f"{self.documents(n)[begun - 1]}: holds the token {token}, but model.model_config.vocab_size is {self.vocab_size}; take the tokenizer of the model")
        if sequence.loss_mask.max() > 1:
            raise PanguError(f"{self.documents(n)[0]}: the .mask holds {sequence.loss_mask.max():.0f} here or in the "
                             "next documents, wanted 0 or 1; tokenise again")


def check_kind(documents):
    if documents not in ("texts", "chats"):
        raise ConfigError(f"train_dataset.data_loader.documents: found {documents!r}, wanted texts or chats")


def as_dataset(source, tensor_parallel, num_shards, shard_id):
    """A pipeline that gives each data parallel rank its sequences of `source`, and tensor parallel ranks the same."""
    if num_shards is not None:
        num_shards, shard_id = num_shards // tensor_parallel, shard_id // tensor_parallel
        source.length -= source.length % num_shards                             # or some sequences would come again
    return GeneratorDataset(source, COLUMNS, shuffle=False, num_parallel_workers=1, python_multiprocessing=False,
                            num_shards=num_shards, shard_id=shard_id)


def source_of(dataset):
    """The Python object that a pipeline draws from, None when it is another kind of source."""
    while dataset.children:
        dataset = dataset.children[0]
    source = getattr(dataset, "source", None)
    return source_of(source.batches) if isinstance(source, Steps) else source
