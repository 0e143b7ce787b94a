"""The sequences that a run draws: of one corpus or several, on one process or several, from the beginning or not."""
import numpy as np
import pytest

from pangu_ms.errors import PanguError
from pangu_ms.text.tokenizer import Tokenizer
from pangu_ms.training.data import loader
from pangu_ms.training.data.indexed import read_indexed, write_index

EOS = 277


@pytest.fixture
def corpus(tmp_path):
    """corpus(name, documents, mask): the prefix of an indexed corpus of int32 that holds them."""
    def write(name, documents, mask=None):
        with open(tmp_path / f"{name}.idx", "wb") as file:
            write_index(file, np.dtype("<i4"), np.array([len(ids) for ids in documents], np.int32))
        np.concatenate(documents).astype("<i4").tofile(tmp_path / f"{name}.bin")
        if mask:
            (tmp_path / f"{name}.mask").write_bytes(bytes(mask))
        return str(tmp_path / name)
    return write


def numbered(begin, count, length):
    """Documents whose tokens are all their number."""
    return [np.full(length, n) for n in range(begin, begin + count)]


def rows(dataset):
    """[N, T] ids of what a pipeline gives."""
    return np.array([row["input_ids"] for row in dataset.create_dict_iterator(num_epochs=1, output_numpy=True)])


def test_a_blend_on_one_process_and_on_four(corpus, tokenizer_directory, caplog):
    """Corpora of 6 and of 20 sequences, asked three to one: the first comes again and again, in another order."""
    path = [3, corpus("a", numbered(0, 6, 4)), 1, corpus("b", numbered(100, 20, 4))]
    arguments = path, tokenizer_directory, 4
    whole = rows(loader.PanguIndexedLoader(*arguments, seed=3, epochs=2))[:, 0]
    assert len(whole) == 52 and (whole < 100).sum() == 39
    assert caplog.messages == [f"the run has each sequence of {path[1]} 6.50 times, each sequence of {path[3]} 0.65 "
                               "times"]
    first = whole[whole < 100]
    epochs = [first[n:n + 6].tolist() for n in range(0, 36, 6)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4, 5] for epoch in epochs) and len(set(map(tuple, epochs))) > 1
    assert len(set(whole[whole >= 100])) == 13
    shards = [rows(loader.PanguIndexedLoader(*arguments, seed=3, epochs=2, num_shards=8, shard_id=rank,
                                             tensor_parallel=2))[:, 0] for rank in (0, 1, 2, 4, 6)]
    assert (shards[0] == shards[1]).all()
    assert np.stack([shards[0], *shards[2:]], axis=1).ravel().tolist() == whole.tolist()


def test_a_run_goes_on_from_a_number(corpus, tokenizer_directory):
    """Whatever had the first sequences: six of them by one process, the others by three."""
    path = [0.6, corpus("a", numbered(0, 6, 4)), 0.4, corpus("b", numbered(100, 9, 4))]
    whole = rows(loader.PanguIndexedLoader(path, tokenizer_directory, 4, seed=5))[:, 0]
    shards = []
    for rank in range(3):
        dataset = loader.PanguIndexedLoader(path, tokenizer_directory, 4, seed=5, num_shards=3, shard_id=rank).batch(1)
        loader.source_of(dataset).first = 6
        shards.append(rows(dataset.take(3))[:, 0, 0])
    assert np.stack(shards, axis=1).ravel().tolist() == whole[6:].tolist()


@pytest.mark.parametrize("documents, mask, message", [
    ([[7, 8], [9, 300, 8]], None, "c: document 1: holds the token 300, but model.model_config.vocab_size is 300; take"),
    ([[7, 8], [9, -1, 8]], None, "c: document 1: holds the token -1, but"),
    ([[7, 2**31 - 1]], None, "c: document 0: holds the token 2147483647, but"),
    ([[1, 2, 3, 4, 5, 6, 299, 8, 400]], None, "c: document 0: holds the token 400, but"),
    ([[7, 8], [9, 1]], [0, 1, 0, 7], "the .mask holds 7 here or in the next documents, wanted 0 or 1; tokenise again")])
def test_what_no_start_could_have_found_is_found_in_its_sequence(corpus, tokenizer_directory, documents, mask, message):
    prefix = corpus("c", [np.array(ids) for ids in documents], mask)
    dataset = loader.PanguIndexedLoader(prefix, tokenizer_directory, 8, documents="chats" if mask else "texts")
    source = loader.source_of(dataset)
    source.vocab_size = 300
    with pytest.raises(RuntimeError, match="PanguError"):
        rows(dataset)
    assert isinstance(source.error, PanguError) and message in str(source.error) and "\n" not in str(source.error)


def test_the_files_are_not_read_at_the_start(corpus, tokenizer_directory, monkeypatch):
    """What is read is the index, and of .bin what a sequence holds."""
    prefix, seen = corpus("c", numbered(0, 100, 8)), []

    class Watched(np.memmap):
        def __getitem__(self, key):
            seen.append(key.stop - key.start)
            return super().__getitem__(key)
    monkeypatch.setattr(loader, "read_indexed", lambda *arguments: watch(read_indexed(*arguments)))

    def watch(documents):
        object.__setattr__(documents, "ids", documents.ids.view(Watched))
        return documents
    source = loader.source_of(loader.PanguIndexedLoader(prefix, tokenizer_directory, 16))
    assert not seen and len(source) == 50
    assert source[7].input_ids.shape == (16,) and sum(seen) <= 2 * 17


def test_a_tokenizer_without_an_end_cannot_pad(corpus, tokenizer_directory, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_directory / "tokenizer.json").read_bytes())
    with pytest.raises(PanguError, match="no token is named as eos_token"):
        loader.PanguIndexedLoader(corpus("c", numbered(0, 6, 4)), tmp_path, 4)
    assert Tokenizer(tokenizer_directory).eos_token_id == EOS
