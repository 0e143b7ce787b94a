"""From one prompt to the next that begins like it, as in a conversation: what is known is not computed again."""

# Tokens at the end of a prompt that ask for the reply, at most: once it has come, a chat template may write others in
# their place, as it leaves out the reasoning of earlier replies.
ASKING = 16


class Continuation:
    """What is left of a text for the next one: give the same one to each `stream_generate` of a conversation.

    Rings hold the last rows alone, so a cache can go on where it stands and nowhere before. Two are kept: that at the
    end of the text, and a copy of that in front of the tokens that asked for the reply. A prompt that begins with the
    ids of neither is computed whole.
    """

    def __init__(self):
        self._engine, self._known = None, []  # of the last text; (ids, the cache of just them), the longer first

    def prefill(self, engine, ids, chunk, on_prefill=None):
        """`engine.prefill` of the prompt ids, a list, on a new engine -> its logits, and how many ids were known."""
        start = found = self._resume(engine, ids)
        for end in (len(ids) - ASKING, len(ids)):
            if end > start:
                logits = engine.prefill([ids[start:end]], chunk, on_prefill)
                if end < len(ids):
                    self._known = [(ids[:end], engine.cache.copy())]
                    start = engine.step_back()
        return logits, found

    def _resume(self, engine, ids):
        """Puts the longest cache that ids go on from into the engine -> its length."""
        before, self._engine = self._engine, engine
        known, self._known = self._known, []
        if before is not None and (before.model, before.drafts) == (engine.model, engine.drafts):
            for text, cache in known:
                if len(text) < len(ids) and text == ids[:len(text)]:
                    engine.cache = cache
                    if len(text) > len(ids) - ASKING:                           # `prefill` passes no place for a copy
                        self._known = [(text, cache.copy())]
                    break
        return engine.step_back()

    def keep(self, text):
        """After the last step, or between two: text, a list, is the prompt and what has come."""
        if self._engine.whole:
            self._known.insert(0, (text[:int(self._engine.cache.length[0])], self._engine.cache))
