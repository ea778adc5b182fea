"""Codes of 1 to 8 bits as a dense stream of bits in 32-bit words, least significant first; codes may straddle words.

Both compressed-tensors and GPTQ lay integer codes out this way, along different axes. Eight codes fill exactly `bits`
bytes, so that all work is done on strided bytes; words are little-endian, as safetensors files are.
"""

import torch
from torch import Tensor

WORD_BITS = 32
CODES_PER_RUN = 8  # the fewest codes that end on a byte at every width


def words_for(count: int, bits: int) -> int:
    """How many 32-bit words `count` codes take."""
    return -(-count * bits // WORD_BITS)


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes: (rows, n) uint8, each below 2^bits. Returns (rows, ⌈n·bits/32⌉) int32; bits past the last code are 0."""
    rows, count = codes.shape
    padding = -count % WORD_BITS
    if padding:
        codes = torch.nn.functional.pad(codes, (0, padding))
    runs = codes.reshape(rows, -1, CODES_PER_RUN)  # (rows, runs, 8)
    packed = torch.zeros(rows, runs.shape[1], bits, dtype=torch.uint8, device=codes.device)
    for position in range(CODES_PER_RUN):
        byte, shift = divmod(position * bits, 8)
        code = runs[:, :, position]
        packed[:, :, byte] |= code << shift  # uint8: what passes bit 7 falls off
        if shift + bits > 8:
            packed[:, :, byte + 1] |= code >> (8 - shift)
    words = packed.view(rows, -1).view(torch.int32)
    return words[:, : words_for(count, bits)].contiguous()


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: words (rows, ⌈count·bits/32⌉) int32. Returns (rows, count) uint8."""
    rows = words.shape[0]
    padding = -words.shape[1] % bits  # `bits` words hold 32 codes
    if padding:
        words = torch.nn.functional.pad(words, (0, padding))
    packed = words.contiguous().view(torch.uint8).view(rows, -1, bits)  # (rows, runs, bits)
    codes = torch.empty(rows, packed.shape[1], CODES_PER_RUN, dtype=torch.uint8, device=words.device)
    mask = 2**bits - 1
    for position in range(CODES_PER_RUN):
        byte, shift = divmod(position * bits, 8)
        code = packed[:, :, byte] >> shift
        if shift + bits > 8:
            code = code | (packed[:, :, byte + 1] << (8 - shift))
        codes[:, :, position] = code & mask
    return codes.view(rows, -1)[:, :count].contiguous()
