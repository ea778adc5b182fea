"""Numbers of tokens in settings files follow a trimmed vocabulary, and tell which tokens have to stay."""

from models.prune.vocabularies.token_ids import named_in, renumbered, renumbered_tokenizer

NEW = {0: 0, 2: 1, 5: 2, 7: 3, 9: 4}
GENERATION = {
    "bos_token_id": 2,
    "eos_token_id": [5, 7],
    "pad_token_id": -1,
    "forced_bos_token_id": None,
    "forced_decoder_ids": [[1, 9], [2, None]],
    "force_words_ids": [[2, 5], [[7], [9]]],
    "suppress_tokens": [3, 5, 8],
    "begin_suppress_tokens": [4],
    "bad_words_ids": [[2, 3], [5, 7]],
    "sequence_bias": [[[2, 7], -1.5], [[8], 2.0]],
    "temperature": 0.6,
    "max_length": 5,
}


def test_tokens_that_settings_name_stay_and_those_that_are_banned_need_not() -> None:
    assert named_in(GENERATION, 100) == {2, 5, 7, 9}
    assert named_in(GENERATION | {"eos_token_id": 100}, 100) == {2, 5, 7, 9}
    assert named_in({"decoder_start_token_id": 4, "vocab_size": 3}, 10) == {4}


def test_settings_get_the_new_numbers_and_bans_of_what_is_left_out_are_left_out() -> None:
    assert renumbered(GENERATION, NEW) == {
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "pad_token_id": -1,
        "forced_bos_token_id": None,
        "forced_decoder_ids": [[1, 4], [2, None]],
        "force_words_ids": [[1, 2], [[3], [4]]],
        "suppress_tokens": [2],
        "begin_suppress_tokens": [],
        "bad_words_ids": [[2, 3]],
        "sequence_bias": [[[1, 3], -1.5]],
        "temperature": 0.6,
        "max_length": 5,
    }


def test_added_tokens_are_listed_by_their_new_numbers() -> None:
    listed = {"added_tokens_decoder": {"7": {"content": "<s>"}, "9": {"content": "</s>"}}, "bos_token": "<s>"}
    assert renumbered_tokenizer(listed, NEW) == {
        "added_tokens_decoder": {"3": {"content": "<s>"}, "4": {"content": "</s>"}},
        "bos_token": "<s>",
    }
    assert renumbered_tokenizer({"bos_token": "<s>"}, NEW) == {"bos_token": "<s>"}
