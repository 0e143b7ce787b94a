"""What a generation request must satisfy, checked before anything heavy is loaded. Needs no MindSpore."""
import json
from numbers import Integral
from pathlib import Path

from pangu_ms.errors import PanguError

MAX_DRAFTS = 8  # what the cache of a drafting engine has room for, see SLACK in pangu_ms/generation/steps.py


def check_request(plan, ids, max_new_tokens, num_draft_tokens=0):
    """Refuses a prompt that the model cannot continue.

    Args:
        plan (Plan): gives the vocabulary, the number of positions and the MTP layers.
        ids (list[int]): the prompt, one sequence.
        max_new_tokens (int): how many tokens may follow it.
        num_draft_tokens (int): drafts a step; 0 is plain decoding.

    Raises:
        PanguError: an empty prompt, an id that is no integer or lies outside the vocabulary, max_new_tokens below 1,
            more positions than the model has, num_draft_tokens outside 0 to MAX_DRAFTS, or drafts without MTP layers
            to make them.
    """
    if len(ids) == 0:
        raise PanguError("the prompt is empty: give at least one token")
    for position, token_id in enumerate(ids):
        if not isinstance(token_id, Integral):
            raise PanguError(f"token {position} of the prompt is {token_id!r}: wanted an integer")
        if not 0 <= token_id < plan.vocab_size:
            raise PanguError(f"token {position} of the prompt is {token_id}, outside the vocabulary: "
                             f"wanted 0 to {plan.vocab_size - 1} (vocab_size {plan.vocab_size})")
    if not isinstance(max_new_tokens, Integral) or max_new_tokens < 1:
        raise PanguError(f"max_new_tokens is {max_new_tokens!r}: wanted an integer of at least 1")
    room = plan.max_positions - len(ids)
    if max_new_tokens > room:
        raise PanguError(f"{len(ids)} prompt tokens and max_new_tokens {max_new_tokens} pass max_position_embeddings "
                         f"{plan.max_positions}: " +
                         (f"ask for at most {room} new tokens" if room > 0 else "shorten the prompt"))
    if not isinstance(num_draft_tokens, Integral) or not 0 <= num_draft_tokens <= MAX_DRAFTS:
        raise PanguError(f"num_draft_tokens is {num_draft_tokens!r}: wanted an integer from 0 to {MAX_DRAFTS}")
    if num_draft_tokens and not plan.mtp_layers:
        raise PanguError(f"num_draft_tokens is {num_draft_tokens}, and the checkpoint has no MTP layers to make them "
                         "of: ask for 0")


def find_eos_token_ids(config, directory) -> tuple[int, ...]:
    """The ids that end generation: those of generation_config.json where it names any, else those of config.json.

    Raises:
        PanguError: generation_config.json is there but is no JSON object, or an id is no integer.
    """
    path, found = Path(directory) / "generation_config.json", None
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, RecursionError, AttributeError) as error:  # AttributeError: JSON, but no object
            raise PanguError(f"{path}: wanted a JSON object ({error}): mend the file or remove it") from None
    if found is None:
        path, found = Path(directory) / "config.json", config.eos_token_id
    ids = found if isinstance(found, (list, tuple)) else [] if found is None else [found]
    for token_id in ids:
        if not isinstance(token_id, int):
            raise PanguError(f"{path}: eos_token_id holds {token_id!r}: wanted an integer or a list of integers")
    return tuple(ids)
