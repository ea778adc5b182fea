"""SentencePiece's own file with fewer pieces, read back by the message's definition that transformers carries."""

from typing import Any

from transformers.utils import sentencepiece_model_pb2_new as messages

from models.prune.vocabularies.sentencepiece import pieces_of, trimmed

NEW = {0: 0, 1: 1, 2: 2, 4: 3, 6: 4}


def written(**trained: int) -> bytes:
    made: Any = messages.ModelProto()
    kinds = [2, 3, 3, 1, 1, 6, 4]  # unknown, control, normal, a byte, of the user's own
    for number, kind in enumerate(kinds):
        made.pieces.add(piece=f"piece {number} é", score=-0.5 * number, type=kind)
    made.trainer_spec.model_type, made.trainer_spec.byte_fallback = 2, True
    made.trainer_spec.vocab_size = len(kinds)
    for name, number in trained.items():
        setattr(made.trainer_spec, name, number)
    made.normalizer_spec.name, made.normalizer_spec.precompiled_charsmap = "identity", b"\x00\xff" * 300
    content: bytes = made.SerializeToString()
    return content


def read(content: bytes) -> Any:
    made: Any = messages.ModelProto()
    made.ParseFromString(content)
    return made


def test_pieces_stay_as_they_are_in_their_order_and_numbers_follow() -> None:
    content = written(pad_id=6, eos_id=4)
    assert pieces_of(content) == [f"piece {number} é" for number in range(7)]
    before, after = read(content), read(trimmed(content, NEW))
    assert list(after.pieces) == [before.pieces[number] for number in NEW]
    told = after.trainer_spec
    assert (told.vocab_size, told.unk_id, told.bos_id, told.eos_id, told.pad_id) == (5, 0, 1, 3, 4)
    assert told.model_type == 2 and told.byte_fallback and after.normalizer_spec == before.normalizer_spec


def test_what_stands_for_no_token_still_does() -> None:
    told = read(trimmed(written(pad_id=-1), NEW)).trainer_spec
    assert (told.unk_id, told.bos_id, told.eos_id, told.pad_id) == (0, 1, 2, -1)


def test_another_file_is_told_from_it() -> None:
    assert pieces_of(b"IQ== 0\nIg== 1\n") is None  # tiktoken's, which goes by the same name
    assert pieces_of(b"") is None and pieces_of(b"\x0a\xff\xff") is None and pieces_of(b"\x08\x01") is None
