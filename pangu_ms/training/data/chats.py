"""Chats: a JSONL file of messages becomes token ids, with the loss on what the assistant says.

Nothing here knows what the chat template writes. It renders each chat with a turn of the assistant and without it, and
the difference is that turn.
"""
import numpy as np

from pangu_ms.errors import PanguError
from pangu_ms.text.chat_template import ChatTemplate
from pangu_ms.text.tokenizer import Tokenizer
from pangu_ms.training.data.documents import Documents, join, kind, name_of, read_jsonl, special_id, text_of

CHAT_KEYS = ("messages", "thinking", "tools")


def read_chats(path, tokenizer: Tokenizer) -> Documents:
    """Documents of a file with one chat a line, a JSON object as `chat_encoder` takes it, and "id" if it has one.

    Args:
        path: the file.
        tokenizer: its directory holds the chat template.

    Raises:
        PanguError: the file cannot be read, a line is no chat or the template refuses it (named as file:line), or the
            file holds no chat.
    """
    encode, pad_id = chat_encoder(tokenizer), special_id(tokenizer, "eos_token")
    found = [document for record in read_jsonl(path) for document in encode([record])]
    if not found:
        raise PanguError(f'{path}: holds no chat: wanted lines of {{"messages": ..., "thinking": ...}}')
    return join(found, may_be_cut=False, pad_id=pad_id)


def chat_encoder(tokenizer: Tokenizer):
    """encode([(where, chat), ...]) -> [(name, ids, counted), ...], the samples of these chats. A chat is

        {"messages": [{"role": "user", "content": "..."},
                      {"role": "assistant", "reasoning_content": "...", "content": "..."}], "thinking": true}

    and "tools", as the template wants them, if it has them. With "thinking" every turn of the assistant has
    "reasoning_content", otherwise none has. The loss counts for what the model writes after the generation prompt:
    reasoning, `</think>`, content, calls and the end of the message. It does not count for the generation prompt, which
    in openPangu-2.0 itself ends with `<think>` (thinking) or `</think>`; its relatives write both marks into the reply.
    "thinking" is left out for a member whose switches are not public.

    {"text": "..."} is a text as in pretraining, with the loss on all of it. Some text in every batch keeps a model from
    forgetting how to write other things than answers.

    A template leaves the reasoning of earlier turns out of later prompts. Where a prompt does not continue the text
    before it, a new sample begins: the prompt as the model would see it, with the loss on the turns from there on. So a
    chat of k turns with thinking is k samples, and a chat without thinking is one sample.

    `encode` raises `PanguError`, which begins with `where`, for what is no chat or what the template refuses.

    Raises:
        PanguError: the tokenizer has no beginning token, or no chat template that can be read.
    """
    template, bos = ChatTemplate(tokenizer), special_id(tokenizer, "bos_token")

    def encode(records):
        found = []
        for where, record in records:
            name = name_of(record, where)
            if "text" in record and "messages" not in record:
                (encoded,) = tokenizer.encode_batch([text_of(record, where)])
                ids = np.array([bos, *encoded], np.int32)
                found.append((name, ids, np.ones(len(ids), bool)))
                continue
            messages, thinking, tools = (record.get(key) for key in CHAT_KEYS)
            _check(messages, tools, where)
            if not isinstance(thinking, bool) and (thinking is not None or template.chat.modes):
                raise PanguError(f'{where}: "thinking" is {kind(thinking)}: wanted true or false')
            samples = _samples(template, messages, thinking, tools, where)
            for number, parts in enumerate(samples, 1):
                encoded = [tokenizer.encode(text, bos=place == 0) for place, (text, _) in enumerate(parts)]
                counted = [np.full(len(ids), is_reply) for ids, (_, is_reply) in zip(encoded, parts)]
                found.append((name if len(samples) == 1 else f"{name} (sample {number})",
                              np.concatenate(encoded), np.concatenate(counted)))
        return found
    return encode


def _samples(template, messages, thinking, tools, where):
    """The samples of a chat. Each is a list of the parts of its text: [(text, whether the assistant says it)].

    The parts are encoded one by one, because a prompt ends between two tokens when the model answers, too.
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
        if not whole.startswith(prompt) or thinking is not None and thinking != bool(message.get("reasoning_content")):
            raise PanguError(f'{where}: messages[{i}] does not go on from its prompt, which ends with '
                             f'{prompt[-8:]!r}: with "thinking" it needs "reasoning_content", without it has none')
        if text is not None and prompt.startswith(text):
            samples[-1].append((prompt[len(text):], False))
        else:
            samples.append([(prompt, False)])
        samples[-1].append((whole[len(prompt):], True))
        text = whole
    return samples


def _check(messages, tools, where):
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
    if tools is not None and not isinstance(tools, list):
        raise PanguError(f'{where}: "tools" is {kind(tools)}: wanted a list')
    roles = [message["role"] for message in messages]
    if "assistant" not in roles or roles[0] == "assistant":
        raise PanguError(f"{where}: the roles are {roles}: wanted a turn of the assistant, behind another")
