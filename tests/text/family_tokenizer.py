"""A small tokenizer.model like the one of openPangu Embedded and its relatives, with the same special tokens."""
import json

import sentencepiece

MARKS = tuple(f"[unused{n}]" for n in (9, 10, 11, 12, 16, 17))
CORPUS = """Hello world, hello words. The capital of Peru is Lima, the answer and the question.
系统：用户：助手：工具：方法：
Other letters: abcdefgijkmnpquvxyz /no_think /auto_think []{}"
"""


def save_family_tokenizer(directory, marks_as="user_defined_symbols", prefix=False):
    """Writes tokenizer.model and tokenizer_config.json into a directory -> the number of ids.

    Args:
        marks_as: kind of the special tokens: "user_defined_symbols" or "control_symbols" of sentencepiece.
        prefix: whether every text begins with a space for sentencepiece.
    """
    corpus = directory / "corpus.txt"
    corpus.write_text(CORPUS * 20, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(directory / "tokenizer"), vocab_size=400, byte_fallback=True,
        model_type="bpe", hard_vocab_limit=False, normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=prefix, minloglevel=2, **{marks_as: list(MARKS)})
    corpus.unlink()
    (directory / "tokenizer.vocab").unlink()
    processor = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    added = {processor.piece_to_id(token): {"content": token, "special": True}
             for token in ("<unk>", "<s>", "</s>", *MARKS)}
    (directory / "tokenizer_config.json").write_text(json.dumps({
        "add_bos_token": True, "add_eos_token": False, "added_tokens_decoder": added, "bos_token": "<s>",
        "eos_token": "[unused10]", "pad_token": "<unk>", "unk_token": "<unk>", "tokenizer_class": "PanguTokenizer"}))
    return processor.get_piece_size()
