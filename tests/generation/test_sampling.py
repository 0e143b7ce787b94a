"""Each processor against values computed by hand, determinism, and that drafts leave the distribution as it is."""
import numpy as np
import pytest

from pangu_ms.errors import PanguError
from pangu_ms.generation.sampling import Sampler, Sampling

# Probabilities 1/2, 1/4, 1/8, 1/16, 1/16 at temperature 1, in no order.
P = np.array([1 / 16, 1 / 4, 1 / 16, 1 / 2, 1 / 8])
LOGITS = (np.log(P) + 3).astype(np.float32)


def probabilities(logits=LOGITS, history=(), **fields):
    fields = {"temperature": 1.0} | fields
    return Sampler(Sampling(**fields), []).probabilities(np.asarray(logits, np.float32), history)


# ---- processors

@pytest.mark.parametrize("fields, wanted", [
    ({}, P),
    ({"temperature": 0.5}, P ** 2 / (P ** 2).sum()),
    ({"temperature": 2.0}, P ** 0.5 / (P ** 0.5).sum()),
    ({"temperature": 1e-320}, [0, 0, 0, 1, 0]),
    ({"temperature": 0}, [0, 0, 0, 1, 0]),
    ({"top_k": 1}, [0, 0, 0, 1, 0]),
    ({"top_k": 3}, np.array([0, 2, 0, 4, 1]) / 7),
    ({"top_k": 4}, np.array([1, 4, 0, 8, 2]) / 15),  # ids 0 and 2 are equal: the lower stays
    ({"top_k": 5}, P),
    ({"top_k": 9}, P),
    ({"top_p": 0.49}, [0, 0, 0, 1, 0]),
    ({"top_p": 0.51}, np.array([0, 1, 0, 2, 0]) / 3),
    ({"top_p": 0.76}, np.array([0, 2, 0, 4, 1]) / 7),
    ({"top_p": 0.9}, np.array([1, 4, 0, 8, 2]) / 15),
    ({"top_p": 1e-9}, [0, 0, 0, 1, 0]),
    ({"min_p": 0.6}, [0, 0, 0, 1, 0]),
    ({"min_p": 0.4}, np.array([0, 1, 0, 2, 0]) / 3),
    ({"min_p": 0.1}, P),
    # In order: top-k leaves 4/7, 2/7, 1/7, of which the first two are enough for 0.8, not so before it.
    ({"top_k": 3, "top_p": 0.8}, np.array([0, 1, 0, 2, 0]) / 3),
    # Temperature comes before top-p: at 1/2 the likeliest has 128/170 alone.
    ({"temperature": 0.5, "top_p": 0.7}, [0, 0, 0, 1, 0]),
    ({"vocab_size": 3}, np.array([1, 4, 1, 0, 0]) / 6),
    ({"vocab_size": 3, "temperature": 0}, [0, 1, 0, 0, 0]),
    ({"vocab_size": 9}, P),
])
def test_processors(fields, wanted):
    found = probabilities(**fields)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert (found[np.asarray(wanted) == 0] == 0).all()


def test_repetition_penalty():
    """Halves what is positive, doubles what is negative, once for each id, before the temperature."""
    logits = [2.0, -1.0, 1.0, -2.0]
    wanted = np.exp([1.0, -2.0, 1.0, -2.0])
    np.testing.assert_allclose(probabilities(logits, [0, 1, 0, 0], repetition_penalty=2.0), wanted / wanted.sum())
    np.testing.assert_allclose(probabilities(logits, {0, 1}, repetition_penalty=2.0, temperature=2.0),
                               wanted ** 0.5 / (wanted ** 0.5).sum())
    assert probabilities([3.0, 2.0], [0], repetition_penalty=2.0, temperature=0).tolist() == [0, 1]


def test_repetition_penalty_sees_prompt_and_accepted_tokens():
    sampler = Sampler(Sampling(repetition_penalty=10.0), [3])
    chosen = []
    for _ in range(4):
        chosen.append(sampler.choose([4.0, 3.0, 2.0, 5.0]))
        sampler.accept(chosen[-1])
    assert chosen == [0, 1, 2, 3], "each is less likely once it is there"


def test_ties_go_to_the_lowest_id():
    assert probabilities([1, 5, 5, 5], temperature=0).tolist() == [0, 1, 0, 0]
    assert probabilities([1, 5, 5, 5], top_k=2).tolist() == [0, 0.5, 0.5, 0]
    assert probabilities([1, 5, 5, 5], top_p=0.5).tolist() == [0, 0.5, 0.5, 0]


def test_top_p_of_a_large_vocabulary():
    """The shortcut that spares the sort keeps what a plain sort keeps."""
    logits = np.random.default_rng(0).normal(0, 3, 5000).astype(np.float32)
    p = probabilities(logits)
    order = np.argsort(-p, kind="stable")
    for share in (0.1, 0.9, 0.999, 0.9999999):
        kept = order[:np.searchsorted(np.cumsum(p[order]), share) + 1]
        assert np.flatnonzero(probabilities(logits, top_p=share)).tolist() == sorted(kept), share


@pytest.mark.parametrize("field, value, wanted", [
    ("temperature", -0.1, "0 .greedy."), ("temperature", float("nan"), "0 .greedy."), ("temperature", "1", "0"),
    ("temperature", float("inf"), "0 .greedy."), ("top_k", -1, "0 .no limit."), ("top_k", 1.5, "0 .no limit."),
    ("top_p", 0, "a number above 0"), ("top_p", 1.1, "a number above 0"), ("min_p", 1, "a number of at least 0"),
    ("min_p", -0.1, "a number of at least 0"), ("repetition_penalty", 0, "a positive number"), ("seed", -1, "0 or"),
    ("vocab_size", 0, "None or a positive integer"),
])
def test_nonsense_is_refused(field, value, wanted):
    with pytest.raises(PanguError, match=f"^{field} is .*: wanted {wanted}") as error:
        Sampling(**{field: value})
    assert repr(value) in str(error.value) and "\n" not in str(error.value)


# ---- determinism

def test_same_seed_same_tokens():
    def tokens(seed):
        sampler = Sampler(Sampling(temperature=1.0, seed=seed), [])
        return [sampler.choose(LOGITS) for _ in range(50)]
    assert tokens(5) == tokens(5) != tokens(6)


def test_sequences_do_not_disturb_each_other():
    alone, one, other = (Sampler(Sampling(temperature=1.0, seed=3), []) for _ in range(3))
    together = [(one.choose(LOGITS), other.choose(LOGITS[::-1]))[0] for _ in range(50)]
    assert together == [alone.choose(LOGITS) for _ in range(50)]


def test_same_seed_same_tokens_with_drafts():
    """Whatever the drafts are: the target draws for each token what it draws without them."""
    rows = np.random.default_rng(1).normal(0, 1, (8, 8)).astype(np.float32)  # logits by the token before
    plain, drafted = (Sampler(Sampling(temperature=1.0, repetition_penalty=1.2, seed=4), [0]) for _ in range(2))
    wanted, text, kept = [0], [0], 0
    for _ in range(60):
        wanted.append(plain.choose(rows[wanted[-1]]))
        plain.accept(wanted[-1])
    while len(text) < 50:
        drafts = [int(rows[text[-1]].argmax()), 3]
        count, token = drafted.verify(rows[[text[-1], *drafts]], drafts)
        for new in [*drafts[:count], token]:
            drafted.accept(new)
            text.append(new)
        kept += count
    assert text == wanted[:len(text)] and kept > 5


# ---- drafts

def logits_for(*tokens):
    """Rows whose largest logit is at these ids."""
    return np.eye(5, dtype=np.float32)[list(tokens)]


@pytest.mark.parametrize("drafts, wanted", [([1, 2, 3], (3, 4)), ([1, 2, 0], (2, 3)), ([0, 2, 3], (0, 1)),
                                            ([1, 0, 3], (1, 2)), ([], (0, 1))])
def test_greedy_keeps_the_longest_prefix(drafts, wanted):
    rows = logits_for(*[1, 2, 3, 4][:len(drafts) + 1])
    assert Sampler(Sampling(), []).verify(rows, drafts) == wanted


def test_penalty_sees_the_drafts_before():
    """The target would repeat token 1; with the penalty it takes token 2 behind a kept draft of 1."""
    rows = np.array([[0, 5, 4], [0, 5, 4]], np.float32)
    assert Sampler(Sampling(), []).verify(rows, [1]) == (1, 1)
    sampler = Sampler(Sampling(repetition_penalty=2.0), [])
    assert sampler.verify(rows, [1]) == (1, 2)
    assert sampler.choose(rows[0]) == 1, "verifying does not change the history"


SIZE, START, DRAWS = 12, 0, 20_000
TARGET = np.random.default_rng(7).normal(0, 0.6, (SIZE, SIZE)).astype(np.float32)  # logits by the token before
# Upper 1 % points of chi-square with 143 and 58 degrees of freedom.
CRITICAL = {143: 185.26, 58: 85.95}
SAMPLINGS = {
    "temperature": dict(temperature=1.3),
    "penalty and cuts": dict(temperature=0.9, repetition_penalty=1.3, top_k=9, top_p=0.93, min_p=0.2, vocab_size=10),
}


def two_tokens_plain(sampler):
    first = sampler.choose(TARGET[START])
    sampler.accept(first)
    return first, sampler.choose(TARGET[first])


def two_tokens_drafted(sampler):
    """The draft is the token that follows by number, until two tokens are there."""
    tokens = [START]
    while len(tokens) < 3:
        draft = (tokens[-1] + 1) % 10
        count, token = sampler.verify(TARGET[[tokens[-1], draft]], [draft])
        for new in [draft, token][1 - count:]:
            sampler.accept(new)
            tokens.append(new)
    return tokens[1:3]


def chi_square(two_tokens, fields):
    """The statistic of DRAWS pairs against the exact distribution of plain sampling, and its degrees of freedom."""
    exact, sampler = np.zeros((SIZE, SIZE)), Sampler(Sampling(**fields), [])
    for first, p in enumerate(sampler.probabilities(TARGET[START], {START})):
        exact[first] = p * sampler.probabilities(TARGET[first], {START, first})
    counts = np.zeros((SIZE, SIZE))
    for seed in range(DRAWS):
        counts[tuple(two_tokens(Sampler(Sampling(seed=seed, **fields), [START])))] += 1
    possible = exact > 0
    assert not counts[~possible].any()
    expected = DRAWS * exact[possible]
    assert expected.min() > 5, "chi-square wants more than a few draws in each cell"
    return ((counts[possible] - expected) ** 2 / expected).sum(), possible.sum() - 1


@pytest.mark.slow
@pytest.mark.parametrize("fields", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("two_tokens", [two_tokens_plain, two_tokens_drafted])
def test_distribution_is_that_of_plain_sampling(two_tokens, fields):
    found, freedom = chi_square(two_tokens, fields)
    assert found < CRITICAL[freedom]


def draws_again(self, logits, drafts):
    """A verification that draws the token behind a refused draft once more, the draft among what may come."""
    own = self.choose(logits[0])
    return (1, self.choose(logits[1])) if own == drafts[0] else (0, self.choose(logits[0]))


@pytest.mark.slow
@pytest.mark.parametrize("broken", [lambda self, logits, drafts: (1, self.choose(logits[1])), draws_again],
                         ids=["always accepting", "drawing again"])
def test_distribution_shows_a_broken_rule(monkeypatch, broken):
    monkeypatch.setattr(Sampler, "verify", broken)
    found, freedom = chi_square(two_tokens_drafted, SAMPLINGS["temperature"])
    assert found > 2 * CRITICAL[freedom]
