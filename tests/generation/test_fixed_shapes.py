"""Steps whose every shape is known, as an accelerator wants them: the same logits, text and drafts, compiled once.

With one length of chunks for all tests of tiny, and caches of 128 rows, its graphs are compiled once for them all.
"""
import numpy as np
import pytest

from pangu_ms import device
from pangu_ms.generation.engine import Engine
from pangu_ms.generation.prefix import Continuation
from pangu_ms.generation.steps import Draft, Step
from pangu_ms.generation.stream import generate, stream_generate

TOLERANCE = 2e-5
PROMPTS = [[9], [5, 6, 7, 8], list(range(20, 50))]
NEW_TOKENS = 66  # tiny: windows of 7, index_topk 8
CHUNK = 4


@pytest.fixture
def fixed(monkeypatch):
    """From the call on, engines want fixed shapes."""
    return lambda: monkeypatch.setattr(device, "wants_fixed_shapes", lambda: True)


@pytest.mark.slow
@pytest.mark.parametrize("name, chunk, drafts", [("tiny", CHUNK, 3), ("odd", 64, 0)])
def test_logits_of_every_length(model, golden, fixed, name, chunk, drafts):
    """Prefills that end inside a chunk, on its edge and one row into the next, and steps behind each."""
    wanted = golden(name, "T64")
    ids, logits = wanted["ids"], wanted["logits"]
    fixed()
    for responses in ([1, 1, chunk], [chunk - 1, 2 * chunk + 1], [17, 4]):
        engine, end = Engine(model(name), num_draft_tokens=drafts, expected=100), 0
        for piece in responses:
            found = engine.prefill(ids[:, end:end + piece], chunk)
            end = int(engine.cache.length[0])
            close(found[0], logits[0, end - 1], logits)
        for position in range(end, min(end + 9, 64), 1 + drafts):
            step = slice(position, position + 1 + drafts)
            close(engine.verify(ids[:, step])[0], logits[0, step], logits)
            engine.cache.length = engine.cache.length + 1 + drafts


@pytest.mark.slow
def test_logits_of_grouped_queries(model, golden, fixed):
    """Two sequences, prefills that end inside a chunk, in a cache that has room for all there will be."""
    wanted = golden("embedded", "T40_B2")
    ids, logits = wanted["ids"], wanted["logits"]
    fixed()
    engine, end = Engine(model("embedded"), batch=2, capacity=8, expected=40), 0
    for piece in (CHUNK - 1, 2 * CHUNK + 1, CHUNK):
        found = engine.prefill(ids[:, end:end + piece], CHUNK)
        end += piece
        close(found, logits[:, end - 1], logits)
    for position in range(end, 40):
        close(engine.decode(ids[:, position:position + 1]), logits[:, position], logits)


def close(found, wanted, all_of_them):
    assert np.abs(found - wanted).max() <= TOLERANCE * np.abs(all_of_them).max()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "ultra_moe"])
def test_the_same_text_and_drafts(model, fixed, monkeypatch, name):
    made, draft = [], Engine.draft

    def recorded(self, texts):
        found = draft(self, texts)
        made.append(found[0].tolist())
        return found
    monkeypatch.setattr(Engine, "draft", recorded)
    options = dict(num_draft_tokens=3, eos_token_ids=(), prefill_chunk=CHUNK)
    wanted = [generate(model(name), prompt, NEW_TOKENS, **options) for prompt in PROMPTS]
    drafts_wanted = made[:]
    made.clear()
    fixed()
    assert [generate(model(name), prompt, NEW_TOKENS, **options) for prompt in PROMPTS] == wanted
    assert made == drafts_wanted


@pytest.mark.slow
def test_a_conversation_goes_on(model, fixed):
    prompt, options = list(range(20, 60)), dict(num_draft_tokens=3, eos_token_ids=(), prefill_chunk=CHUNK)

    def turns(continuation):
        first = [response.token_id for response in stream_generate(model("tiny"), prompt, 26, continuation=continuation,
                                                             **options)]
        longer = prompt + first + [7, 8, 9] * 4
        return first, [response.token_id for response in stream_generate(model("tiny"), longer, 20,
                                                                         continuation=continuation, **options)]
    wanted = turns(None)
    fixed()
    assert turns(Continuation()) == wanted


@pytest.mark.slow
def test_one_compilation_for_each_length_and_sparse(model, fixed):
    """Of prompts of many lengths: prefill and verifying, each before and after index_topk, and drafting."""
    fixed()
    for length in (1, 2, 5, 9, 17, 27):
        generate(model("tiny"), list(range(20, 20 + length)), 70 - length, num_draft_tokens=3, eos_token_ids=(),
                 prefill_chunk=CHUNK)
    functions = {key: step for key, step in model("tiny")._functions.items()
                 if key == (Draft, (1, 3, None)) or key[0] is Step and key[1][0] == 1 and key[1][-1] is not None}
    assert {len(step.compile_cache) for step in functions.values()} == {1}
    assert sorted(cell.__name__ for cell, _ in functions) == ["Draft"] + ["Step"] * 4


@pytest.mark.parametrize("fix", [True, False])
def test_what_a_prefill_is_compiled_for(model, golden, fixed, fix):
    """Every shape that it is given is known; on a CPU those of the text and of growing tensors are open."""
    if fix:
        fixed()
    wanted = golden("tiny", "T64")
    found = Engine(model("tiny"), num_draft_tokens=3).prefill(wanted["ids"][:, :3], CHUNK)
    close(found[0], wanted["logits"][0, 2], wanted["logits"])
    step = model("tiny").function(Step, 1, None, False, True, *((CHUNK, 8) if fix else (None, None)))
    ids, _, tensors, *_ = step.get_inputs()
    shapes = [ids.shape] + [tensor.shape for layer in tensors for tensor in layer]
    assert len(shapes) > 30
    assert any(min(shape) < 0 for shape in shapes) != fix
