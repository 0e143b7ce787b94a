"""Requests are refused before anything heavy is loaded, each with its reason."""
import json
from types import SimpleNamespace

import numpy as np
import pytest

from pangu_ms.errors import PanguError
from pangu_ms.generation.request import check_request, find_defaults, find_eos_token_ids


def plan(mtp=3):
    return SimpleNamespace(vocab_size=10, max_positions=16, mtp_layers=(None,) * mtp)


@pytest.mark.parametrize("ids, new", [([0], 15), ([9, 0, 9], 13), (list(np.arange(10)), 6), (np.arange(4), 1)])
def test_what_fits_passes(ids, new):
    check_request(plan(), ids, new)


@pytest.mark.parametrize("ids, new, words", [
    ([], 1, "prompt is empty"),
    ([3, 10], 1, "token 1 of the prompt is 10, outside the vocabulary: wanted 0 to 9"),
    ([-1], 1, "token 0 of the prompt is -1, outside the vocabulary"),
    ([1, 2.0], 1, "token 1 of the prompt is 2.0: wanted an integer"),
    ([1], 0, "max_new_tokens is 0"),
    ([1], 1.5, "max_new_tokens is 1.5"),
    ([1], 16, "max_position_embeddings 16: ask for at most 15 new tokens"),
    ([1] * 16, 1, "max_position_embeddings 16: shorten the prompt"),
    ([1] * 20, 1, "max_position_embeddings 16: shorten the prompt"),
])
def test_what_does_not_fit_is_refused(ids, new, words):
    with pytest.raises(PanguError, match=words):
        check_request(plan(), ids, new)


@pytest.mark.parametrize("heads, drafts, words", [
    (0, 1, "num_draft_tokens is 1, and the checkpoint has no MTP layers to make them of: ask for 0"),
    (3, 9, "num_draft_tokens is 9: wanted an integer from 0 to 8"),
    (3, -1, "num_draft_tokens is -1: wanted an integer from 0 to 8"),
    (3, 1.5, "num_draft_tokens is 1.5: wanted an integer from 0 to 8"),
])
def test_drafts_that_cannot_be_made_are_refused(heads, drafts, words):
    with pytest.raises(PanguError, match=words):
        check_request(plan(heads), [1], 1, drafts)


@pytest.mark.parametrize("heads, drafts", [(0, 0), (3, 3), (1, 5)])
def test_drafts_that_can_be_made_pass(heads, drafts):
    check_request(plan(heads), [1], 1, drafts)


@pytest.mark.parametrize("in_config, generation_config, wanted", [
    (2, None, (2,)),
    ([2, 5], None, (2, 5)),
    (None, None, ()),
    (2, '{"eos_token_id": 7}', (7,)),
    (2, '{"eos_token_id": [7, 8]}', (7, 8)),
    (2, '{"temperature": 1.0}', (2,)),
])
def test_eos_token_ids(tmp_path, in_config, generation_config, wanted):
    if generation_config is not None:
        (tmp_path / "generation_config.json").write_text(generation_config)
    assert find_eos_token_ids(SimpleNamespace(eos_token_id=in_config), tmp_path) == wanted


@pytest.mark.parametrize("text, words", [("{", "wanted a JSON object"), ("[2]", "wanted a JSON object"),
                                         ('{"eos_token_id": "2"}', "eos_token_id holds '2'"),
                                         ('{"eos_token_id": [2, null]}', "eos_token_id holds None")])
def test_broken_generation_config_is_named(tmp_path, text, words):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(PanguError, match=f"generation_config.json: {words}"):
        find_eos_token_ids(SimpleNamespace(eos_token_id=2), tmp_path)


SAMPLING = {"temperature": 1.0, "top_p": 0.8, "top_k": 0}


@pytest.mark.parametrize("fields, options, left_aside", [
    (None, {}, []),
    ({"eos_token_id": 7, "transformers_version": "4.53.2", "num_beams": 1, "output_scores": True}, {}, []),
    ({"do_sample": True} | SAMPLING, SAMPLING, []),
    ({"do_sample": True, "top_k": None}, {"temperature": 1.0}, []),
    ({"temperature": 0.6, "top_p": None}, {}, ["temperature (do_sample is not true)"]),
    ({"do_sample": False, "max_new_tokens": 9, "repetition_penalty": 1.1},
     {"max_new_tokens": 9, "repetition_penalty": 1.1}, []),
    ({"do_sample": True, "typical_p": 0.9, "own": 3}, {"temperature": 1.0}, ["typical_p 0.9", "own 3"]),
])
def test_defaults_of_generation_config(tmp_path, fields, options, left_aside):
    if fields is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(fields))
    assert find_defaults(tmp_path) == (options, left_aside)


@pytest.mark.parametrize("fields, words", [
    ({"do_sample": True, "temperature": "hot"}, "temperature is 'hot': wanted 0 .greedy. or a positive number"),
    ({"do_sample": True, "top_p": 2}, "top_p is 2: wanted"), ({"max_new_tokens": 1.5}, "max_new_tokens is 1.5: wanted"),
])
def test_a_default_out_of_range_is_named(tmp_path, fields, words):
    (tmp_path / "generation_config.json").write_text(json.dumps(fields))
    with pytest.raises(PanguError, match=f"generation_config.json: {words}"):
        find_defaults(tmp_path)
