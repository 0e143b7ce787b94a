"""Chats: JSONL files of messages to token ids, with the loss on what the assistant says.

The template of the tokenizer's directory is taken as it is: what it gives with and without a turn of the assistant
shows where that turn lies.
"""
import numpy as np

from pangu_ms.errors import PanguError
from pangu_ms.generation.chat import ChatTemplate
from pangu_ms.training.data import Documents, gather, kind, name_of, read_jsonl, special_id, text_of


def read_chats(path, tokenizer_directory) -> Documents:
    """Documents of chats, one JSON object a line:

        {"messages": [{"role": "user", "content": "..."},
                      {"role": "assistant", "reasoning_content": "...", "content": "..."}], "thinking": true}

    and optionally "tools", as the template wants them, and "id". With "thinking" every turn of the assistant has
    "reasoning_content", otherwise none has. The loss counts for what the model writes after the generation prompt:
    reasoning, `</think>`, content, calls and the end of the message. The generation prompt itself ends with `<think>`
    (thinking) or `</think>`, on which no loss counts.

    A line {"text": "..."} among them is text as in pretraining, with the loss on all of it: some of it in every batch
    keeps a model from forgetting how to write other things than answers.

    A template leaves the reasoning of earlier turns out of later prompts. Where a prompt does not continue the text
    before it, a sample of its own begins: that prompt as the model would see it, and the loss on the turns from there
    on. So a chat of k turns with thinking is k samples, and one without thinking is one sample.

    Raises:
        PanguError: a file that cannot be read, a line that is no chat or that the template refuses (file:line), or
            no chat at all.
    """
    template = ChatTemplate(tokenizer_directory)
    found, bos = [], special_id(template.tokenizer, "bos_token", tokenizer_directory)
    for where, record in read_jsonl(path):
        if "text" in record and "messages" not in record:
            ids = np.array([bos, *template.encode(text_of(record, where))], np.int32)
            found.append((name_of(record, where), ids, np.ones(len(ids), bool)))
            continue
        messages, tools = record.get("messages"), record.get("tools")
        _check(messages, record.get("thinking"), tools, where)
        samples = _samples(template, messages, record["thinking"], tools, where)
        name = name_of(record, where)
        for number, parts in enumerate(samples, 1):
            encoded = [template.encode(text) for text, _ in parts]
            counted = [np.full(len(ids), is_reply) for ids, (_, is_reply) in zip(encoded, parts)]
            found.append((name if len(samples) == 1 else f"{name} (sample {number})",
                          np.concatenate(encoded), np.concatenate(counted)))
    if not found:
        raise PanguError(f'{path}: holds no chat: wanted lines of {{"messages": ..., "thinking": ...}}')
    return gather(found, may_be_cut=False, pad_id=special_id(template.tokenizer, "eos_token", tokenizer_directory))


def _samples(template, messages, thinking, tools, where):
    """A list of samples, each the parts of its text in order: [(text, whether the assistant says it)].

    Parts are encoded one by one: the end of a prompt is a boundary between tokens when the model answers, too.
    """
    samples, text = [], None
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        try:
            prompt = template.text(messages[:i], thinking, tools)
            whole = template.text(messages[:i + 1], thinking, tools, add_generation_prompt=False)
        except PanguError as error:
            raise PanguError(f"{where}: {error}") from None
        if not whole.startswith(prompt):
            raise PanguError(f'{where}: messages[{i}] does not go on from its prompt, which ends with '
                             f'{prompt[-8:]!r}: with "thinking" it needs "reasoning_content", without it has none')
        if text is not None and prompt.startswith(text):
            samples[-1].append((prompt[len(text):], False))
        else:
            samples.append([(prompt, False)])
        samples[-1].append((whole[len(prompt):], True))
        text = whole
    return samples


def _check(messages, thinking, tools, where):
    """Raises PanguError for what is no chat, before the template sees it."""
    if not isinstance(messages, list):
        raise PanguError(f'{where}: "messages" is {kind(messages)}: wanted a list')
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise PanguError(f"{where}: messages[{i}] is {kind(message)}: wanted an object")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise PanguError(f'{where}: "{key}" of messages[{i}] is {kind(message.get(key))}: wanted text')
        if not isinstance(message.get("reasoning_content", ""), str):
            raise PanguError(f'{where}: "reasoning_content" of messages[{i}] is '
                             f'{kind(message["reasoning_content"])}: wanted text')
    if not isinstance(thinking, bool):
        raise PanguError(f'{where}: "thinking" is {kind(thinking)}: wanted true or false')
    if tools is not None and not isinstance(tools, list):
        raise PanguError(f'{where}: "tools" is {kind(tools)}: wanted a list')
    roles = [message["role"] for message in messages]
    if "assistant" not in roles or roles[0] == "assistant":
        raise PanguError(f"{where}: the roles are {roles}: wanted a turn of the assistant, behind another")
