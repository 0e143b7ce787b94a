"""A small tokenizer with a chat template: 256 bytes, 40 merges, and the special tokens from id 296 on."""
from toy_tokenizer import train_tokenizer


def save_tokenizer(directory):
    """Writes the tokenizer's files into a directory -> the number of ids."""
    vocab_size = 256 + 40 + 8
    train_tokenizer(["the capital of Peru is Lima, the answer and the question, user assistant system"], vocab_size,
                    directory)
    return vocab_size
