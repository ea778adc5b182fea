"""Packing against the two libraries that define the layouts."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32

from models.formats.packing import pack, unpack, words_for


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 31, 32, 33, 96, 100, 257])
def test_words_are_those_of_compressed_tensors_and_unpack_to_the_same_codes(bits: int, count: int) -> None:
    codes = torch.randint(0, 2**bits, (5, count), dtype=torch.uint8)
    signed = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)

    words = pack(codes, bits)

    assert words.dtype == torch.int32
    assert words.shape == (5, words_for(count, bits))
    assert torch.equal(words, pack_to_int32(signed, bits))
    assert torch.equal(unpack(words, bits, count), codes)
    theirs = unpack_from_int32(words, bits, torch.Size((5, count)))
    assert torch.equal(theirs, signed)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_along_the_other_axis_are_those_of_compressed_tensors(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (96, 5), dtype=torch.uint8)
    signed = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)

    assert torch.equal(pack(codes.t(), bits).t(), pack_to_int32(signed, bits, packed_dim=0))


def test_the_first_code_lies_in_the_lowest_bits_and_codes_straddle_words() -> None:
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, 0], codes[0, 10] = 5, 7  # code 10 has bits 30, 31 and 32

    words = pack(codes, 3)

    assert words.tolist() == [[5 + (0b11 << 30) - (1 << 32), 1, 0]]
