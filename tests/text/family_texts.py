"""What the tests' tokenizer.model of the family learns from."""
from family_tokenizer import train_family_tokenizer

CORPUS = """Hello world, hello words. The capital of Peru is Lima, the answer and the question.
系统：用户：助手：工具：方法：
Other letters: abcdefgijkmnpquvxyz /no_think /auto_think []{}"
"""


def save_family_tokenizer(directory, marks_as="user_defined_symbols", prefix=False):
    """As `train_family_tokenizer`, of a few hundred ids."""
    return train_family_tokenizer((CORPUS * 20).splitlines(), 400, directory, marks_as, prefix)
