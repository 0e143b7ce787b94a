"""What a generation request must satisfy and what it gets unasked, before anything heavy is loaded. Needs no MindSpore.
"""
import json
from numbers import Integral
from pathlib import Path

from pangu_ms.errors import PanguError
from pangu_ms.generation.sampling import Sampling

MAX_DRAFTS = 8  # what the cache of a drafting engine has room for, see SLACK in pangu_ms/generation/steps.py
GENERATION_CONFIG = "generation_config.json"
WHEN_SAMPLING = ("temperature", "top_k", "top_p", "min_p")  # count with do_sample alone, as in transformers
ALWAYS = ("repetition_penalty", "max_new_tokens")
NEUTRAL = {  # fields of generation_config.json that change the text at other values than these, and are not done here
    "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "no_repeat_ngram_size": 0, "typical_p": 1,
    "epsilon_cutoff": 0, "eta_cutoff": 0, "length_penalty": 1, "diversity_penalty": 0, "encoder_repetition_penalty": 1,
    "encoder_no_repeat_ngram_size": 0, "min_length": 0, "early_stopping": False, "remove_invalid_values": False,
    "renormalize_logits": False, "presence_penalty": 0, "frequency_penalty": 0,
}
WITHOUT_EFFECT = ("bos_token_id", "pad_token_id", "eos_token_id", "do_sample", "transformers_version",
                  "_from_model_config", "use_cache")  # eos_token_id: of `find_eos_token_ids`


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
    path, fields = _read_generation_config(directory)
    found = fields.get("eos_token_id")
    if found is None:
        path, found = Path(directory) / "config.json", config.eos_token_id
    ids = found if isinstance(found, (list, tuple)) else [] if found is None else [found]
    for token_id in ids:
        if not isinstance(token_id, int):
            raise PanguError(f"{path}: eos_token_id holds {token_id!r}: wanted an integer or a list of integers")
    return tuple(ids)


def find_defaults(directory) -> tuple[dict, list[str]]:
    """What generation_config.json gives where the request says nothing.

    Returns:
        (options, left_aside): `max_new_tokens` and fields of `Sampling` as far as the file has them, those of drawing
        where its do_sample is true; and in words, what else it asks for and does not get. Empty without a file.

    Raises:
        PanguError: the file is no JSON object, or a value is out of its range.
    """
    path, fields = _read_generation_config(directory)
    fields = {name: value for name, value in fields.items() if value is not None}
    sampling = {name: fields[name] for name in WHEN_SAMPLING if name in fields}
    left_aside = [f"{name} {value}" for name, value in fields.items()
                  if name not in (*WHEN_SAMPLING, *ALWAYS, *WITHOUT_EFFECT)
                  and not name.startswith(("output_", "return_")) and (name not in NEUTRAL or value != NEUTRAL[name])]
    if fields.get("do_sample") is True:
        sampling = {"temperature": 1.0} | sampling
    elif sampling:
        left_aside.insert(0, f"{', '.join(sampling)} (do_sample is not true)")
        sampling = {}
    options = sampling | {name: fields[name] for name in ALWAYS if name in fields}
    try:
        Sampling(**{name: value for name, value in options.items() if name != "max_new_tokens"})
    except PanguError as error:
        raise PanguError(f"{path}: {error}") from None
    if type(options.get("max_new_tokens", 1)) is not int:
        raise PanguError(f"{path}: max_new_tokens is {options['max_new_tokens']!r}: wanted an integer")
    return options, left_aside


def _read_generation_config(directory):
    """(path, fields) of generation_config.json, {} where there is none."""
    path = Path(directory) / GENERATION_CONFIG
    if not path.is_file():
        return path, {}
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PanguError(f"{path}: wanted a JSON object ({error}): mend the file or remove it") from None
    if not isinstance(fields, dict):
        raise PanguError(f"{path}: wanted a JSON object: mend the file or remove it")
    return path, fields
