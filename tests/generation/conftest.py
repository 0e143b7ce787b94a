"""What the tests of the command share: a model that needs no weights, behind the real engine."""
import os
import signal
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest


class CountingModel:
    """A model that counts upwards from its prompt; its compiled functions compute nothing else.

    `begin` says what it is asked next, and what it replies instead of counting: ids, and functions to call on the way;
    then an end.
    """

    def __init__(self, config, ranks):
        self.config, self.plan, self.ranks = config, config.plan, ranks

    def begin(self, ids, reply, end):
        self.prompt, self.reply, self.end = len(ids), reply and [*reply, end], end

    def function(self, cell, batch, length, sparse=None, drafting=False, *shapes):
        if cell.__name__ == "Draft":
            return Compiled(self.draft, length)
        ahead = len(self.plan.mtp_layers) if drafting else 0                    # ids that a prefill reads behind rows
        return Compiled(self.step, slice(None) if length else slice(-1 - ahead, -ahead or None))

    def step(self, rows, ids, start, tensors, *counted):
        """Logits of these rows: all when decoding, of a prefill the last."""
        position = start + np.arange(ids.shape[1]) + 1                          # of what follows each row
        following = [[self.token(*each) for each in zip(*pair)] for pair in zip(ids, position)]
        return ms.Tensor(np.eye(self.plan.vocab_size, dtype=np.float32)[following][:, rows])

    def token(self, before, position):
        place = position - self.prompt                                          # in the reply
        if not self.reply or place < 0:
            return (before + 1) % self.plan.vocab_size
        while callable(self.reply[place]):
            self.reply.pop(place)()
        return self.reply[place]

    def draft(self, drafts, tokens, start, tensors):
        """The first draft is right, the others are not."""
        return ms.Tensor((tokens[:, -1:] + np.r_[1, [0] * (drafts - 1)]) % self.plan.vocab_size, ms.int32), None


class Compiled:
    """A compiled function: of what it was compiled for, of tensors, and of what it takes of a cache."""

    def __init__(self, function, constant):
        self.function, self.constant = function, constant

    def __call__(self, ids, start, *others):
        return self.function(self.constant, ids.asnumpy(), start.asnumpy(), *others)

    def arguments(self, cache):
        return None


@pytest.fixture
def engine(monkeypatch):
    """calls: how a `CountingModel` was loaded and asked; `calls.reply` is what it says where it shall not count."""
    from pangu_ms import pretrained
    from pangu_ms.architectures import read_config
    from pangu_ms.generation import stream
    calls = SimpleNamespace(loaded=None, prompts=[], options=None, reply=None)

    def from_pretrained(directory, dtype, progress, ranks, adapter):
        calls.loaded = (directory, dtype, progress)
        return CountingModel(read_config(directory), ranks)

    def stream_generate(model, ids, max_new_tokens, **options):
        calls.prompts.append(list(ids))
        calls.options = options
        model.begin(ids, calls.reply, options["eos_token_ids"][-1])
        return generate(model, ids, max_new_tokens, **options)

    generate = stream.stream_generate
    monkeypatch.setattr(pretrained.PanguForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(stream, "stream_generate", stream_generate)
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
