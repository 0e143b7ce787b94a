"""The trained toy in examples/toy: it writes, its MTP layers draft what it writes, it ends an answer."""
from pathlib import Path

import pytest

from pangu_ms import PanguForCausalLM, stream_generate
from pangu_ms.text.chat_template import ChatTemplate
from pangu_ms.text.tokenizer import Tokenizer

TOY = Path(__file__).parents[1] / "examples" / "toy"
CODE = "def main():\n    import argparse\n    parser = argparse.ArgumentParser()\n"


@pytest.fixture(scope="module")
def toy():
    return PanguForCausalLM.from_pretrained(TOY)


@pytest.mark.slow
def test_drafts_are_accepted_and_change_nothing(toy):
    prompt = Tokenizer(TOY).encode(CODE)
    texts = {}
    for drafts in (0, 3):
        *pieces, last = stream_generate(toy, prompt, 64, num_draft_tokens=drafts, eos_token_ids=())
        texts[drafts] = [piece.token_id for piece in pieces] + [last.token_id]
    assert texts[0] == texts[3]
    assert last.accepted[0] / last.drafted[0] > 0.6


@pytest.mark.slow
def test_it_answers_what_it_was_taught(toy):
    tokenizer = Tokenizer(TOY)
    template = ChatTemplate(tokenizer)
    ids = template.render([{"role": "user", "content": "What is the capital of Peru?"}], thinking=True)
    reply = [piece.token_id for piece in stream_generate(toy, ids, 40, eos_token_ids=template.stop_token_ids)]
    text = tokenizer.decode(reply)
    assert text.startswith("The country is Peru. Its capital is") and "</think>" in text
    assert reply[-1] in template.stop_token_ids


def test_its_files_are_small():
    assert sum(path.stat().st_size for path in TOY.iterdir()) < 12.5e6
    assert (TOY / "model.safetensors").stat().st_size < 12e6
