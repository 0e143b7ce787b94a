"""Drafting, verifying, rolling back: greedy text must not change, and drafts must be what the MTP layers would say."""
import numpy as np
import pytest

from pangu_ms.generation.engine import Engine
from pangu_ms.generation.sampling import Sampler, Sampling
from pangu_ms.generation.stream import generate, generate_batch, stream_generate

PROMPTS = [[9], [5, 6, 7, 8], list(range(20, 50))]
NEW_TOKENS = 24  # past every window and past index_topk
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def greedy(model):
    """Greedy text without drafts, by prompt."""
    texts = {}

    def text(prompt, name="tiny"):
        key = (name, *prompt)
        if key not in texts:
            texts[key] = generate(model(name), prompt, NEW_TOKENS, eos_token_ids=())
        return texts[key]
    return text


@pytest.mark.slow
@pytest.mark.parametrize("name, drafts", [("tiny", 1), ("tiny", 3), ("tiny", 5), ("pro_moe_v2", 2), ("ultra_moe", 1),
                                          ("ultra_moe", 3)])
def test_drafts_do_not_change_greedy_text(model, greedy, name, drafts):
    """Of MTP layers with windows, and of one that sees the whole context."""
    for prompt in PROMPTS:
        responses = list(stream_generate(model(name), prompt, NEW_TOKENS, num_draft_tokens=drafts, eos_token_ids=()))
        assert [response.token_id for response in responses] == greedy(prompt, name)
        assert len(responses[-1].drafted) == drafts and min(responses[-1].drafted) > 9
        assert sum(response.draft_depth > 0 for response in responses) == sum(responses[-1].accepted)


@pytest.mark.slow
@pytest.mark.parametrize("name, drafts", [("tiny", 0), ("tiny", 3), ("ultra_moe", 3)])
def test_a_batch_gives_what_each_prompt_gives_alone(model, greedy, name, drafts):
    found = generate_batch(model(name), PROMPTS, NEW_TOKENS, num_draft_tokens=drafts, eos_token_ids=())
    assert found == [greedy(prompt, name) for prompt in PROMPTS]


@pytest.mark.slow
def test_one_sequence_of_a_batch_may_end_early(model, greedy):
    """An end token of the longest prompt's text: it stops there, the others go on as if it were alone."""
    texts = [greedy(prompt) for prompt in PROMPTS]
    end = next(token for token in texts[2] if token not in texts[0] + texts[1])
    assert texts[2].index(end) + 1 < NEW_TOKENS
    found = generate_batch(model("tiny"), PROMPTS, NEW_TOKENS, num_draft_tokens=3, eos_token_ids=[end])
    assert found[:2] == texts[:2]
    assert found[2] == texts[2][:texts[2].index(end) + 1]


@pytest.mark.slow
@pytest.mark.parametrize("name, file, acceptances", [
    ("tiny", "T64", (0, 3, 1, 0, 3, 3, 2, 0)), ("pro_moe_v2", "T40_B2", (0, 2, 1, 0, 2, 2, 1, 0)),
    ("ultra_moe", "T40_B2", (0, 3, 1, 0, 3, 3, 2, 0))])
def test_drafts_are_those_of_the_full_forward(model, golden, name, file, acceptances):
    """The chain of MTP layers on the same history, after accepted drafts (the true next ones, put in) and rejected."""
    text = golden(name, file)["ids"][0].tolist()
    after = [0] * 64  # one length of full forwards, which do not look ahead: one graph
    engine = Engine(model(name), num_draft_tokens=max(acceptances))
    length = 20  # known tokens; all but the last are in the cache
    engine.prefill(np.array([text[:length - 1]], np.int32))
    for kept in acceptances:
        drafts, logits = engine.draft([text[:length]])
        full = model(name).mtp_logits(np.array([(text[:length] + drafts[0].tolist() + after)[:64]], np.int32))
        for depth, logits_of_all in enumerate(full, 1):
            wanted = logits_of_all.asnumpy()[0, length - 2]
            found = logits.asnumpy()[0, depth - 1]
            assert np.abs(found - wanted).max() <= TOLERANCE * np.abs(wanted).max()
            assert drafts[0, depth - 1] == wanted.argmax()
        # The first `kept` drafts become true ones, the others stay as they are, and are wrong.
        tried = text[length:length + kept] + drafts[0, kept:].tolist()
        engine.verify(np.array([[text[length - 1]] + tried], np.int32))
        engine.cache.length = engine.cache.length + 1 + kept
        length += 1 + kept


@pytest.mark.slow
def test_verifying_gives_the_logits_of_the_full_forward(model, golden):
    """Also for what was rolled back in between: wrong drafts leave no trace."""
    wanted = golden("tiny", "T64")
    ids, logits = wanted["ids"], wanted["logits"]
    engine = Engine(model("tiny"), num_draft_tokens=3)
    engine.prefill(ids[:, :5])
    while (length := int(engine.cache.length[0])) < 40:
        engine.verify((ids[:, length:length + 4] + 7) % 199)                    # all wrong, all rolled back
        found = engine.verify(ids[:, length:length + 4])
        assert np.abs(found - logits[:, length:length + 4]).max() <= TOLERANCE * np.abs(logits).max()
        engine.cache.length = engine.cache.length + 1 + length % 4


@pytest.mark.slow
def test_a_snapshot_goes_on_where_it_was_taken(model, golden):
    """A shared prefix is computed once; what one continuation writes, the other does not see."""
    ids, logits = golden("tiny", "T64")["ids"], golden("tiny", "T64")["logits"]
    engine = Engine(model("tiny"), num_draft_tokens=3)
    engine.prefill(ids[:, :30])
    shared = engine.cache.copy()
    for _ in range(2):
        engine.verify((ids[:, 30:34] + 5) % 199)
        engine.cache.length = engine.cache.length + 4
        engine.cache = shared.copy()
        found = engine.verify(ids[:, 30:34])
        assert np.abs(found - logits[:, 30:34]).max() <= TOLERANCE * np.abs(logits).max()


def test_nothing_is_compiled_again_while_generating(model):
    """The cache grows past 256 rows; lengths of prompts and of prefill chunks vary."""
    def generate_all():
        list(stream_generate(model("tiny"), [1] * 20, 3, eos_token_ids=()))
        list(stream_generate(model("tiny"), [1, 2], 12, eos_token_ids=(), prefill_chunk=1))
        list(stream_generate(model("tiny"), [1] * 250, 12, eos_token_ids=(), prefill_chunk=77))
    generate_all()
    functions = dict(model("tiny")._functions)
    generate_all()
    assert model("tiny")._functions == functions
    assert {len(step.compile_cache) for step in functions.values()} == {1}


def test_a_batch_of_nothing(model):
    assert generate_batch(model("tiny"), [], 5) == []


@pytest.mark.parametrize("drafts", [0, 3])
def test_reasons_and_probabilities(model, greedy, drafts):
    """The last response says why it is the last; each token's probability is that of the full forward."""
    prompt, text = PROMPTS[1], greedy(PROMPTS[1])
    found = list(stream_generate(model("tiny"), prompt, NEW_TOKENS, num_draft_tokens=drafts, eos_token_ids=(),
                                 logprobs=2))
    assert [response.finish_reason for response in found] == [None] * (NEW_TOKENS - 1) + ["length"]
    ended = list(stream_generate(model("tiny"), prompt, NEW_TOKENS, num_draft_tokens=drafts, eos_token_ids=text[5:6]))
    end = text.index(text[5])
    assert [response.finish_reason for response in ended] == [None] * end + ["stop"]
    logits = model("tiny")([(prompt + text + [0] * 64)[:64]]).asnumpy()[0].astype(np.float64)
    for place, response in enumerate(found, len(prompt) - 1):
        exact = logits[place] - np.log(np.exp(logits[place]).sum())
        assert response.logprobs.token == pytest.approx(exact[response.token_id], abs=1e-4)
        (best, likeliest), (_, second) = response.logprobs.top
        assert best == exact.argmax() and likeliest == response.logprobs.token >= second


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["as it is", "always accepting"])
def test_sampled_text_keeps_its_distribution(model, golden, monkeypatch, rule):
    """20,000 draws of the next two tokens, four choices each, by steps that verify a draft, against plain sampling."""
    text = golden("tiny", "T24")["ids"]
    sampling = dict(temperature=1.5, top_k=4)
    engine = Engine(model("tiny"), num_draft_tokens=1)
    engine.prefill(text[:, :-1])
    first = engine.verify(text[:, -1:])[0, 0]
    likely = np.argsort(-first)[:4]
    draft = likely[1]  # neither never nor always accepted
    second = {token: engine.verify(np.array([[text[0, -1], token]], np.int32))[0, 1] for token in likely}
    rows = engine.verify(np.array([[text[0, -1], draft]], np.int32))[0]

    plain = Sampler(Sampling(**sampling), [])
    exact = np.array([plain.probabilities(first, ())[token] * plain.probabilities(second[token], ())
                      for token in likely])
    if rule == "always accepting":
        monkeypatch.setattr(Sampler, "verify", lambda self, logits, drafts: (1, self.choose(logits[1])))
    counts = np.zeros_like(exact)
    for seed in range(20_000):
        sampler = Sampler(Sampling(seed=seed, **sampling), [])
        accepted, own = sampler.verify(rows, [draft])
        pair = (draft, own) if accepted else (own, sampler.choose(second[own]))
        counts[list(likely).index(pair[0]), pair[1]] += 1
    possible = exact > 0
    assert possible.sum() == 16 and not counts[~possible].any() and 20_000 * exact[possible].min() > 5
    expected = 20_000 * exact[possible]
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    assert (statistic < 30.58) == (rule == "as it is")  # the upper 1 % point of chi-square with 15 degrees of freedom
