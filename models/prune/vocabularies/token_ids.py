"""Numbers of tokens in settings: `config.json`, `generation_config.json`, `tokenizer_config.json`."""

from collections.abc import Mapping
from typing import Any

NAMED = "_token_id"  # ends settings for tokens that a text begins or ends with, say: one number or a list of them
FORCED_PLACES = "forced_decoder_ids"  # places in the output, each with a number
# Of tokens that it is kept from writing; one that is left out is not written anyway.
BANNED = ("suppress_tokens", "begin_suppress_tokens")
BANNED_SEQUENCES = "bad_words_ids"
FORCED_SEQUENCES = "force_words_ids"  # lists of numbers, or lists of such lists of which one is forced
BIASED_SEQUENCES = "sequence_bias"  # lists of numbers, each with a bias

Numbers = Mapping[int, int]  # the new of each old number that stays


def named_in(settings: Mapping[str, Any], rows: int) -> set[int]:
    """Numbers of tokens that have to stay for settings to mean what they did. rows: of the embedding; what some
    settings have for no token at all, -1 say, is none of them.
    """
    found: list[int] = []
    for name, value in settings.items():
        found += _flat(value) if name.endswith(NAMED) else []
    for place in settings.get(FORCED_PLACES) or []:
        found += _flat(place[1])
    found += _flat(settings.get(FORCED_SEQUENCES))
    return {number for number in found if 0 <= number < rows}


def renumbered(settings: Mapping[str, Any], numbers: Numbers) -> dict[str, Any]:
    """`config.json` or `generation_config.json` of the trimmed model, but for the size of its vocabulary."""
    left = {name: _mapped(value, numbers) if name.endswith(NAMED) else value for name, value in settings.items()}
    if left.get(FORCED_PLACES):
        left[FORCED_PLACES] = [[place, _mapped(number, numbers)] for place, number in left[FORCED_PLACES]]
    if left.get(FORCED_SEQUENCES):
        left[FORCED_SEQUENCES] = _mapped(left[FORCED_SEQUENCES], numbers)
    for name in BANNED:
        if isinstance(left.get(name), list):
            left[name] = [numbers[number] for number in left[name] if number in numbers]
    if left.get(BANNED_SEQUENCES):
        left[BANNED_SEQUENCES] = [
            _mapped(each, numbers) for each in left[BANNED_SEQUENCES] if set(each) <= set(numbers)
        ]
    if isinstance(left.get(BIASED_SEQUENCES), list):
        stays = [(each, bias) for each, bias in left[BIASED_SEQUENCES] if set(each) <= set(numbers)]
        left[BIASED_SEQUENCES] = [[_mapped(each, numbers), bias] for each, bias in stays]
    return left


def renumbered_tokenizer(settings: Mapping[str, Any], numbers: Numbers) -> dict[str, Any]:
    """`tokenizer_config.json` of the trimmed model."""
    added = settings.get("added_tokens_decoder")
    if not isinstance(added, dict):
        return dict(settings)
    kept = {str(numbers[int(number)]): token for number, token in added.items() if int(number) in numbers}
    return {**settings, "added_tokens_decoder": kept}


def _flat(value: Any) -> list[int]:
    if isinstance(value, list):
        return [number for each in value for number in _flat(each)]
    return [value] if type(value) is int else []


def _mapped(value: Any, numbers: Numbers) -> Any:
    """A number that is no token's, as -1, stays."""
    if isinstance(value, list):
        return [_mapped(each, numbers) for each in value]
    return numbers.get(value, value) if type(value) is int else value
