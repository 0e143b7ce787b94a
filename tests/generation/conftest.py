"""What the tests of the command share: an engine that needs no model."""
import os
import signal
import sys
from types import ModuleType, SimpleNamespace

import pytest

from pangu_ms.config import PanguConfig
from pangu_ms.generation.request import check_request
from pangu_ms.generation.text import TextStream


@pytest.fixture
def engine(monkeypatch):
    """A model that counts upwards from its prompt, in place of the real ones; records how it was called.

    calls.reply, where set, is what it says instead: ids, and functions to call on the way.
    """
    calls = SimpleNamespace(loaded=None, prompts=[], options=None, reply=None)

    def from_pretrained(directory, dtype, progress, parallel):
        calls.loaded = (directory, dtype, progress)
        return "model"

    def stream_generate(model, ids, max_new_tokens, *, tokenizer, stop, on_prefill, **options):
        check_request(PanguConfig.from_pretrained(calls.loaded[0]), ids, max_new_tokens)
        calls.prompts.append(ids)
        calls.options = options
        for done in range(1, len(ids) + 1):
            on_prefill(done)
        reply = calls.reply or range(ids[-1] + 1, ids[-1] + 1 + max_new_tokens)
        text = tokenizer and TextStream(tokenizer, stop)
        for i, token_id in enumerate(reply):
            if callable(token_id):
                token_id()
                continue
            shown = text and text.push(token_id, last=i + 1 == len(reply))
            yield SimpleNamespace(token_id=token_id, text=shown, source=0, tokens_per_second=4.0, cache_bytes=100 + i,
                                  prefill_seconds=0.5, decode_seconds=0.25 * i, prefill_tokens=len(ids),
                                  decode_tokens=i, drafted=(4, 2), accepted=(3, 0))
            if text and text.stopped:
                return

    causal_lm, module = ModuleType("pangu_ms.model.causal_lm"), ModuleType("pangu_ms.generation.stream")
    causal_lm.PanguForCausalLM = SimpleNamespace(from_pretrained=from_pretrained)
    module.stream_generate = stream_generate
    monkeypatch.setitem(sys.modules, causal_lm.__name__, causal_lm)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


@pytest.fixture
def press_ctrl_c():
    """Ctrl-C while a graph runs, when MindSpore's handler stands in the place of Python's; both are put back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def press():
        signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        os.kill(os.getpid(), signal.SIGINT)

    yield press
    for number, handler in handlers.items():
        signal.signal(number, handler)
