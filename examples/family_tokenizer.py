"""Trains a small tokenizer.model like the one of openPangu Embedded and its relatives, with the same special tokens."""
import io
import json
from pathlib import Path

import sentencepiece

MARKS = tuple(f"[unused{n}]" for n in (9, 10, 11, 12, 16, 17))


def train_family_tokenizer(texts, vocab_size: int, directory, marks_as="user_defined_symbols", prefix=False) -> int:
    """Writes tokenizer.model and tokenizer_config.json into a directory, which is made if missing.

    Args:
        texts: iterable of str.
        vocab_size: the most ids it may have; few texts give fewer.
        marks_as: kind of the special tokens: "user_defined_symbols" or "control_symbols" of sentencepiece.
        prefix: whether every text begins with a space for sentencepiece.

    Returns:
        The number of ids.
    """
    directory, model = Path(directory), io.BytesIO()
    directory.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=vocab_size, byte_fallback=True, model_type="bpe",
        hard_vocab_limit=False, normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=prefix, minloglevel=2, **{marks_as: list(MARKS)})
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    added = {processor.piece_to_id(token): {"content": token, "special": True}
             for token in ("<unk>", "<s>", "</s>", *MARKS)}
    (directory / "tokenizer_config.json").write_text(json.dumps({
        "add_bos_token": True, "add_eos_token": False, "added_tokens_decoder": added, "bos_token": "<s>",
        "eos_token": "[unused10]", "pad_token": "<unk>", "unk_token": "<unk>", "tokenizer_class": "PanguTokenizer"}))
    return processor.get_piece_size()
