"""A prompt that begins like the text before: the same tokens and drafts as from scratch, fewer computed."""
import pytest

from pangu_ms.generation.engine import Engine
from pangu_ms.generation.prefix import ASKING, Continuation
from pangu_ms.generation.stream import stream_generate

NEW_TOKENS = 20
FIRST = list(range(20, 60))


@pytest.fixture
def drafts_made(monkeypatch):
    """All drafts that engines make, in order: random weights have few accepted, so the text alone shows little."""
    made, draft = [], Engine.draft

    def recorded(self, texts):
        drafts, logits = draft(self, texts)
        made.append(drafts.tolist())
        return drafts, logits
    monkeypatch.setattr(Engine, "draft", recorded)
    return made


def turn(model, prompt, drafts, continuation=None, most=NEW_TOKENS, **options):
    """The new ids, and how many tokens of the prompt were computed."""
    responses = []
    for response in stream_generate(model("tiny"), prompt, NEW_TOKENS, num_draft_tokens=drafts, eos_token_ids=(),
                                 continuation=continuation, **options):
        responses.append(response)
        if len(responses) == most:
            break
    return [response.token_id for response in responses], responses[-1].prefill_tokens


@pytest.mark.slow
@pytest.mark.parametrize("drafts, again", [(0, 0), (1, 2), (3, 6), (5, 8)])
def test_turns_give_what_they_give_alone(model, drafts, again, drafts_made):
    """`again` is what a drafting engine computes once more."""
    continuation = Continuation()

    def check(prompt, known, most=NEW_TOKENS):
        reply, computed = turn(model, prompt, drafts, continuation, most)
        made = drafts_made.copy()
        drafts_made.clear()
        assert (reply, len(prompt)) == turn(model, prompt, drafts, most=most)
        assert made == drafts_made
        drafts_made.clear()
        assert computed == len(prompt) - max(known - again, 0)
        return reply

    first = check(FIRST, 0)
    second = FIRST + first + [7, 8]                     # the last token of a reply has been read by nobody
    check(second, len(second) - 3)
    third = second[:-3] + [3] * 30                      # as if the second prompt had asked otherwise
    check(third, len(second) - 3)
    fourth = third[:-ASKING] + [4] * 30                 # as if the third had; and this reply is left early
    reply = check(fourth, len(third) - ASKING, most=1)
    check(fourth + reply + [7], len(fourth))
    check([4] + fourth, 0)


@pytest.mark.slow
@pytest.mark.parametrize("drafts", [0, 3])
def test_a_step_that_was_cut_short_leaves_nothing_to_go_on_from(model, drafts, monkeypatch):
    """Ctrl-C behind a step, before its tokens count: the ring has lost a row, the text would go on wrongly."""
    continuation, steps, verify = Continuation(), [], Engine.verify

    def interrupted(self, ids):
        logits = verify(self, ids)
        steps.append(ids)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return logits

    text = []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Engine, "verify", interrupted)
        for response in stream_generate(model("tiny"), FIRST, NEW_TOKENS, num_draft_tokens=drafts, eos_token_ids=(),
                                     continuation=continuation):
            text.append(response.token_id)
    prompt = FIRST + text + [9]
    reply, computed = turn(model, prompt, drafts, continuation)
    assert reply == turn(model, prompt, drafts)[0]
    assert computed == len(prompt) - (len(FIRST) - ASKING) + (6 if drafts else 0), "from the copy in the prompt"


def test_a_short_prompt_and_another_number_of_drafts(model):
    continuation = Continuation()
    reply, _ = turn(model, [5, 6], 0, continuation, most=3)
    longer = [5, 6] + reply + [7]
    assert turn(model, longer, 1, continuation, most=3)[1] == len(longer)
