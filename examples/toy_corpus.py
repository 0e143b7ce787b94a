"""What a toy model learns from: the Python standard library's own source, and generated chats about small things.

python examples/toy_corpus.py --output DIR

writes tokenizer/, pretrain.jsonl and heldout.jsonl ({"id": path, "text": source}), chats.jsonl and chats_heldout.jsonl
({"id", "messages", "thinking"}); among the chats are pieces of the texts. No question of chats_heldout.jsonl stands in
chats.jsonl; what it asks about does, in other words, but for sums and words to spell. The same Python version gives the
same files on every machine.
"""
import argparse
import ast
import hashlib
import itertools
import json
import random
import sysconfig
import tokenize
from pathlib import Path

from toy_tokenizer import train_tokenizer

# Tests, programs that are no library, tables of data, and what is written when Python is installed.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip",
            "msilib", "encodings", "pydoc_data", "__phello__", "entities.py"}
HELD_OUT_FILES, HELD_OUT_QUESTIONS = 2, 5  # percent
CHATS = 8000
EXCERPTS, EXCERPT_LENGTH = 1400, 1400  # pieces of texts among the chats, characters of each
VOCABULARY = 4096

CAPITALS = {
    "Argentina": "Buenos Aires", "Austria": "Vienna", "Belgium": "Brussels", "Bolivia": "Sucre", "Chile": "Santiago",
    "China": "Beijing", "Colombia": "Bogota", "Cuba": "Havana", "Denmark": "Copenhagen", "Egypt": "Cairo",
    "Finland": "Helsinki", "France": "Paris", "Germany": "Berlin", "Greece": "Athens", "Hungary": "Budapest",
    "India": "New Delhi", "Iran": "Tehran", "Ireland": "Dublin", "Italy": "Rome", "Japan": "Tokyo", "Kenya": "Nairobi",
    "Mongolia": "Ulaanbaatar", "Nepal": "Kathmandu", "Norway": "Oslo", "Peru": "Lima", "Poland": "Warsaw",
    "Portugal": "Lisbon", "Russia": "Moscow", "Spain": "Madrid", "Sweden": "Stockholm", "Thailand": "Bangkok",
    "Turkey": "Ankara", "Uruguay": "Montevideo", "Vietnam": "Hanoi"}

# Modules whose public functions the chats ask about.
MODULES = ["ast", "base64", "bisect", "calendar", "colorsys", "copy", "csv", "dataclasses", "difflib", "dis", "fnmatch",
           "functools", "getopt", "getpass", "gettext", "glob", "gzip", "heapq", "imghdr", "inspect", "json", "keyword",
           "linecache", "locale", "mimetypes", "operator", "os", "pickle", "platform", "pprint", "random", "re",
           "reprlib", "secrets", "shelve", "shlex", "shutil", "socket", "statistics", "string", "subprocess",
           "tempfile", "textwrap", "timeit", "token", "tokenize", "traceback", "types", "typing", "uuid", "warnings",
           "weakref", "zipfile"]


def library_files(directory=None) -> list[tuple[str, str]]:
    """(path below the directory, with /; source) of each file of a standard library, in the order of the paths.

    The library is that of the running Python if no directory is given.
    """
    directory = Path(directory or sysconfig.get_path("stdlib"))
    paths = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*.py")}
    found = []
    for name, path in sorted(paths.items()):
        parts = name.split("/")
        if LEFT_OUT.isdisjoint(parts) and not parts[-1].startswith("_sysconfigdata") and "config-" not in parts[0]:
            found.append((name, read_source(path)))
    return [(name, text) for name, text in found if text.strip()]


def read_source(path) -> str:
    with tokenize.open(path) as file:  # in the encoding that the file itself names
        return file.read()


def held_out(text: str, percent: int) -> bool:
    """Whether a path or a question is kept from training: by its hash, so that it does not depend on the others."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 100 < percent


def function_facts(files: list[tuple[str, str]]) -> dict[str, tuple[str, list[str]]]:
    """{function: (its module, names of its arguments)} for functions that one of MODULES alone defines."""
    found, seen_twice = {}, set()
    for name, text in files:
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        if module not in MODULES:
            continue
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and node.name.islower() and not node.name.startswith("_"):
                arguments = [argument.arg for argument in node.args.posonlyargs + node.args.args]
                if node.name in found and found[node.name][0] != module:
                    seen_twice.add(node.name)
                found[node.name] = (module, arguments)
    return {name: fact for name, fact in found.items() if name not in seen_twice and len(fact[1]) <= 4}


class Questions:
    """Draws (question, reasoning, answer) about things that can be checked.

    Args:
        files: of `library_files`, for questions about functions and the words to spell; () leaves those out.
        seed: of all draws.
    """

    def __init__(self, files, seed=0):
        self._random = random.Random(seed)
        self._functions = function_facts(files)
        self._words = sorted({part for name in self._functions for part in name.split("_")
                              if part.isalpha() and part.islower() and 3 <= len(part) <= 6})
        self._kinds = [self._module, self._arguments, self._sum, self._product, self._backwards, self._capital]
        if not files:
            self._kinds = [self._sum, self._product, self._capital]

    def chat(self) -> dict:
        """{"messages", "thinking"}: one or two questions, behind a system message now and then."""
        thinking = self._random.random() < 0.5
        messages = []
        if self._random.random() < 0.25:
            messages.append({"role": "system", "content": self._random.choice(
                ["Answer in few words.", "You know Python well.", "You are a helpful assistant."])})
        for _ in range(1 + (self._random.random() < 0.25)):
            question, reasoning, answer = self._random.choice(self._kinds)()
            reply = {"role": "assistant", "content": answer}
            if thinking:
                reply["reasoning_content"] = reasoning
            messages += [{"role": "user", "content": question}, reply]
        return {"messages": messages, "thinking": thinking}

    def _one_of(self, *phrases):
        return self._random.choice(phrases)

    def _module(self):
        name, (module, _) = self._random.choice(list(self._functions.items()))
        question = self._one_of(f"In which module is `{name}` defined?", f"Which module has the function `{name}`?",
                                f"Where do I import `{name}` from?", f"What module is `{name}` in?")
        return question, f"`{name}` is a function of the module {module}.", f"`{name}` is in the module `{module}`."

    def _arguments(self):
        name, (module, arguments) = self._random.choice(list(self._functions.items()))
        question = self._one_of(f"Which arguments does `{name}` take?", f"What do I pass to `{module}.{name}`?",
                                f"How is `{module}.{name}` called?")
        call = f"{name}({', '.join(arguments)})"
        return question, f"In {module}.py: def {call}", f"`{module}.{call}`"

    def _sum(self):
        a, b = self._random.randint(0, 9), self._random.randint(0, 9)
        question = self._one_of(f"What is {a} + {b}?", f"Add {a} and {b}.", f"{a} plus {b}?")
        steps = ", ".join(str(a + step) for step in range(1, b + 1))
        return question, f"From {a} I count {b} up: {steps}." if b else f"Adding 0 leaves {a}.", str(a + b)

    def _product(self):
        a, b = self._random.randint(1, 9), self._random.randint(1, 9)
        question = self._one_of(f"What is {a} * {b}?", f"Multiply {a} by {b}.", f"{a} times {b}?")
        steps = ", ".join(str(a * step) for step in range(1, b + 1))
        return question, f"From 0 I go up by {a}, {b} times: {steps}.", str(a * b)

    def _backwards(self):
        word = self._random.choice(self._words)
        question = self._one_of(f"Spell '{word}' backwards.", f"Write the word '{word}' in reverse.",
                                f"What is '{word}' from back to front?")
        return question, f"Its letters are {' '.join(word)}. In reverse: {' '.join(word[::-1])}.", word[::-1]

    def _capital(self):
        country, capital = self._random.choice(list(CAPITALS.items()))
        question = self._one_of(f"What is the capital of {country}?", f"Name the capital of {country}.",
                                f"Which city is the capital of {country}?")
        return question, f"The country is {country}. Its capital is {capital}.", f"{capital}."


def write_corpus(directory, library=None, chats: int = CHATS) -> dict[str, int]:
    """Writes the four files into a directory, which is made if missing.

    Args:
        library: directory of the standard library; that of the running Python if None.
        chats: how many are drawn; those that come a second time are left out.

    Returns:
        {file name: lines in it}.
    """
    files = library_files(library)
    lines = {"pretrain.jsonl": [], "heldout.jsonl": [], "chats.jsonl": [], "chats_heldout.jsonl": []}
    for name, text in files:
        file = "heldout.jsonl" if held_out(name, HELD_OUT_FILES) else "pretrain.jsonl"
        lines[file].append({"id": name, "text": text})
    questions = Questions(files)
    drawn = [questions.chat() for _ in range(chats)]
    for name, chat in {hashlib.sha256(json.dumps(chat).encode()).hexdigest()[:12]: chat for chat in drawn}.items():
        tried = {held_out(message["content"], HELD_OUT_QUESTIONS) for message in chat["messages"]
                 if message["role"] == "user"}
        if len(tried) == 1:  # a chat with a question of each kind belongs to neither
            lines["chats_heldout.jsonl" if tried.pop() else "chats.jsonl"].append({"id": name, **chat})
    lines["chats.jsonl"] += excerpts(lines["pretrain.jsonl"])
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for file, records in lines.items():
        write_jsonl(directory / file, records)
    return {file: len(records) for file, records in lines.items()}


def excerpts(records) -> list[dict]:
    """Pieces of the texts that are trained on, for the chats, so that answering does not replace writing."""
    draw, found = random.Random(2), []
    for number in range(EXCERPTS):
        record = draw.choice(records)
        lines = record["text"].splitlines(keepends=True)
        first = draw.randrange(len(lines))
        found.append({"id": f"{record['id']} from line {first + 1}", "text": "".join(lines[first:])[:EXCERPT_LENGTH]})
    return found


def write_jsonl(path, records):
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    Path(path).write_text(text, encoding="utf-8")


def train_toy_tokenizer(directory):
    """directory/tokenizer, from the texts and the chats that are trained on."""
    directory = Path(directory)
    texts = (record["text"] for record in _records(directory / "pretrain.jsonl"))
    chats = (message["content"] for record in _records(directory / "chats.jsonl")
             for message in record.get("messages", ()))
    train_tokenizer(itertools.chain(texts, chats), VOCABULARY, directory / "tokenizer")


def _records(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, metavar="DIR", help="where the files go")
    directory = Path(parser.parse_args().output)
    lines_of = write_corpus(directory)
    train_toy_tokenizer(directory)
    for name, lines in lines_of.items():
        print(f"{name:20} {lines:6,} lines {(directory / name).stat().st_size:12,} bytes")


if __name__ == "__main__":
    main()
