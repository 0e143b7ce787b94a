"""Texts to documents."""
import logging
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tokenizers

from pangu_ms.errors import PanguError
from pangu_ms.text.tokenizer import Tokenizer
from pangu_ms.training.data.documents import read_texts

BOS, EOS = 276, 277


@pytest.fixture(scope="module")
def tokenizer(tokenizer_directory):
    return Tokenizer(tokenizer_directory)


@pytest.fixture(scope="module")
def decode(tokenizer_directory):
    """decode(ids): their text, special tokens and all."""
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_directory / "tokenizer.json"))
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=False)


def test_documents_are_the_texts_between_beginning_and_end(jsonl, tokenizer, decode):
    texts = [f"the {i} é\n" * (i % 5 + 1) for i in range(200)]
    path = jsonl([{"text": text} | ({"id": f"n{i}"} if i % 2 else {}) for i, text in enumerate(texts)])
    documents = read_texts(path, tokenizer)
    assert len(documents) == 200 and documents.may_be_cut and documents.pad_id == EOS
    assert documents.names[:3] == [f"{path}:1", "n1", f"{path}:3"]
    assert documents.ids.dtype == np.int32 and documents.counted.all()
    for text, start, end in zip(texts, documents.offsets, documents.offsets[1:], strict=False):
        ids = documents.ids[start:end]
        assert (ids[0], ids[-1]) == (BOS, EOS)
        assert decode(ids[1:-1]) == text
    assert documents.offsets[-1] == len(documents.ids) == len(documents.counted)


def test_a_text_that_spells_beginnings_and_ends_keeps_its_characters(jsonl, tokenizer, decode):
    text = "a<|pangu_text_end|><|message_start|>b"
    ids = read_texts(jsonl([{"text": text}]), tokenizer).ids
    assert max(ids[1:-1]) < BOS
    assert decode(ids[1:-1]) == text


def test_empty_texts_are_left_out_and_counted(jsonl, tokenizer, caplog):
    path = jsonl([{"text": ""}, {"text": "a"}, "", {"text": ""}])
    with caplog.at_level(logging.WARNING):
        documents = read_texts(path, tokenizer)
    assert (len(documents), documents.skipped) == (1, 2)
    assert caplog.messages == [f"{path}: 2 empty texts left out"]


@pytest.mark.parametrize("line, message", [
    ("{", "not JSON (Expecting property name enclosed in double quotes: line 2 column 1 (char 2)): "
          "mend the line or remove it"),
    ("[" * 100000, "not JSON (nested too deeply): mend the line or remove it"),
    (b'{"text": "\xff"}', "not UTF-8 (invalid start byte): convert the file"),
    (r'{"text": "\ud800"}', "not UTF-8 (surrogates not allowed): convert the file"),
    (["text"], "a list: wanted a JSON object"),
    ({"content": "a"}, '"text" is missing: wanted text'),
    ({"text": 7}, '"text" is a number: wanted text')])
def test_a_broken_line_is_named(jsonl, tokenizer, line, message):
    path = jsonl([{"text": "good"}, "", line])
    with pytest.raises(PanguError) as caught:
        read_texts(path, tokenizer)
    assert str(caught.value) == f"{path}:3: {message}"


def test_files_that_are_not_there_or_hold_nothing(jsonl, tokenizer, tmp_path):
    with pytest.raises(PanguError, match="none.jsonl: cannot be read .No such file or directory.: check the path$"):
        read_texts(tmp_path / "none.jsonl", tokenizer)
    with pytest.raises(PanguError, match='lines.jsonl: holds no document: wanted lines of {"text": ...}$'):
        read_texts(jsonl([{"text": ""}]), tokenizer)


def test_a_tokenizer_without_an_end(jsonl, tokenizer_directory, tmp_path):
    shutil.copy(tokenizer_directory / "tokenizer.json", tmp_path)
    with pytest.raises(PanguError, match=r": no token is named as bos_token: name it in tokenizer_config.json, and"):
        read_texts(jsonl([{"text": "a"}]), Tokenizer(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<|pangu_text_start|>", "eos_token": "none"}')
    with pytest.raises(PanguError, match=r": no token is named as eos_token: name it in tokenizer_config.json, and"):
        read_texts(jsonl([{"text": "a"}]), Tokenizer(tmp_path))


def test_reading_and_packing_load_no_framework():
    code = ("import sys, pangu_ms.training.data.chats, pangu_ms.training.data.packing; "
            "print(sorted({'mindspore', 'mindformers', 'torch'} & set(sys.modules)))")
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
