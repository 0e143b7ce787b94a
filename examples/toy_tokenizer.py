"""Trains a small tokenizer of the released kind: a byte-level BPE, its special tokens and its chat template.

The released tokenizer has 148,899 ids, then the special tokens, then those of images (spec section 9). This one has as
many ids as it is asked for. The first 256 are the bytes, the last ones are the same special tokens in the same order.
"""
import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from pangu_ms.errors import PanguError

BOS, EOS = "<|pangu_text_start|>", "<|pangu_text_end|>"
MESSAGE_START, MESSAGE_END = "<|message_start|>", "<|message_end|>"
# Name and whether it is special: what is not decodes as text.
SPECIAL_TOKENS = {BOS: True, EOS: True, MESSAGE_START: True, MESSAGE_END: True,
                  "<|tool_call_start|>": False, "<|tool_call_end|>": False, "<think>": False, "</think>": False}

# Contractions, words with what stands before them, single digits, symbols, newlines, spaces.
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
           r"|\s*[\r\n]+|\s+(?!\S)|\s+")

# Variables: messages, tools, add_generation_prompt (true), thinking (true), context_thinking ("Interleave": reasoning
# is kept in the turns after the last user turn, among the results of tools; "All": everywhere). A turn whose reasoning
# is left out begins with </think>, as the prompt without thinking does.
CHAT_TEMPLATE = r"""
{%- set thinking = thinking | default(true) -%}
{%- set context_thinking = context_thinking | default("Interleave") -%}
{%- set add_generation_prompt = add_generation_prompt | default(true) -%}
{%- set ns = namespace(system="", last_user=-1) -%}
{%- for message in messages -%}
    {%- if message.role not in ["system", "user", "assistant", "tool"] -%}
        {{- raise_exception("unknown role " ~ message.role) -}}
    {%- elif message.role == "system" and not loop.first -%}
        {{- raise_exception("a system message must be the first") -}}
    {%- elif message.role == "system" -%}
        {%- set ns.system = message.content -%}
    {%- elif message.role == "user" -%}
        {%- set ns.last_user = loop.index0 -%}
    {%- endif -%}
{%- endfor -%}
{{- bos_token ~ "<|message_start|>system\n" ~ ns.system -}}
{%- if tools -%}
    {{- "\n\nYou may call these functions:\n<tools>\n" ~ tools | tojson ~ "\n</tools>\n"
        ~ "1. Call them between <|tool_call_start|> and <|tool_call_end|>.\n"
        ~ "2. A call is a JSON list of {\"name\": ..., \"arguments\": {...}}.\n"
        ~ "3. Results come as messages of the role tool." -}}
{%- endif -%}
{{- "<|message_end|>" -}}
{%- for message in messages -%}
    {%- if message.role != "system" -%}
        {{- "<|message_start|>" ~ message.role ~ "\n" -}}
    {%- endif -%}
    {%- if message.role == "assistant" -%}
        {%- if message.reasoning_content and (context_thinking == "All" or loop.index0 > ns.last_user) -%}
            {{- "<think>" ~ message.reasoning_content -}}
        {%- endif -%}
        {{- "</think>" -}}
    {%- endif -%}
    {%- if message.role != "system" -%}
        {{- message.content -}}
        {%- if message.tool_calls -%}
            {{- "<|tool_call_start|>\n" ~ message.tool_calls | map(attribute="function") | list | tojson
                ~ "\n<|tool_call_end|>" -}}
        {%- endif -%}
        {{- "<|message_end|>" -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|message_start|>assistant\n" ~ ("<think>" if thinking else "</think>") -}}
{%- endif -%}
"""


def train_tokenizer(texts, vocab_size: int, directory):
    """Learns merges from texts, and writes tokenizer.json, tokenizer_config.json and chat_template.jinja.

    The tokenizer normalises nothing and knows every character: decoding gives back what was encoded. The same texts in
    the same order give the same files.

    Args:
        texts: iterable of str.
        vocab_size: how many ids: 256 bytes, merges, and the special tokens last.
        directory: is made if it is missing. Files of these names in it are replaced.

    Raises:
        PanguError: vocab_size is too small for the bytes and the special tokens, or larger than the texts give.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise PanguError(f"vocab_size is {vocab_size}: the bytes and the special tokens alone are {smallest} ids")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(SPECIAL_TOKENS), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(name, special=special, normalized=False)
                          for name, special in SPECIAL_TOKENS.items()])
    found = tokenizer.get_vocab_size()
    if found != vocab_size:
        raise PanguError(f"vocab_size is {vocab_size}: the texts give {found} ids: bring more text or ask for fewer")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS, "pad_token": EOS,
        "padding_side": "left", "clean_up_tokenization_spaces": False}, indent=1), encoding="utf-8")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE.strip(), encoding="utf-8")
