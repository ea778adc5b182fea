"""Small models with a tokenizer of each kind, trained on words that were drawn."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.models import tiny

BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SIZE = 700


def words(seed: int, count: int) -> Iterator[str]:
    """Lines of words that are made of few syllables; other seeds draw other words of the same syllables."""
    dice = random.Random(seed)
    syllables = ["ka", "lo", "mi", "ten", "ru", "é", "zu", "sha", "本", "Ж", "or", "in", "est", "ing"]
    known = ["".join(dice.choices(syllables, k=dice.randrange(1, 5))) for _ in range(120)]
    for _ in range(count):
        yield " ".join(dice.choices(known, k=12)) + dice.choice([".", "!\n", " 17\t", "  …"])


def byte_level(*, ignore_merges: bool = False) -> Tokenizer:
    """As GPT-2's, or with `ignore_merges` as Llama 3's."""
    made = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not ignore_merges)
    split = pre_tokenizers.Split(Regex(LLAMA_3), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_]) if ignore_merges else bytes_
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=SIZE, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(_texts(), trainer)
    made.add_special_tokens([BEGIN, END])
    made.add_tokens([AddedToken("<|user|>", normalized=False), AddedToken("<|assistant|>", normalized=False)])
    return _begun(made)


def sentencepiece_bpe() -> Tokenizer:
    """As Llama 2's: characters, with bytes for those that are unknown."""
    made = Tokenizer(models.BPE(unk_token=UNKNOWN, byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    known = [UNKNOWN, BEGIN, END, *(f"<0x{number:02X}>" for number in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=SIZE, special_tokens=known, show_progress=False)
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # while it is trained, so that words are merged
    made.train_from_iterator(_texts(), trainer)
    made.pre_tokenizer = None
    rules = _without_added_bytes(made)
    return _begun(Tokenizer.from_str(rules))


def unigram() -> Tokenizer:
    """As T5's: the likeliest division into pieces."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Replace(Regex(" {2,}"), " ")
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    special = [UNKNOWN, BEGIN, END]
    trainer = trainers.UnigramTrainer(
        vocab_size=SIZE, special_tokens=special, unk_token=UNKNOWN, show_progress=False, shrinking_factor=0.9
    )
    made.train_from_iterator(_texts(), trainer)
    return _begun(made)


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": byte_level,
    "ignore_merges": lambda: byte_level(ignore_merges=True),
    "sentencepiece_bpe": sentencepiece_bpe,
    "unigram": unigram,
}


def model_with(tokenizer: Tokenizer, directory: Path, family: str = "llama", **changes: object) -> Path:
    """A random model of a family with this tokenizer, which begins a text and knows chats."""
    numbers = {name: tokenizer.token_to_id(token) for name, token in (("bos", BEGIN), ("eos", END))}
    sizes = {"vocab_size": tokenizer.get_vocab_size(), **{f"{name}_token_id": one for name, one in numbers.items()}}
    tiny.save(family, directory, **(sizes | changes))
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        chat_template=TEMPLATE,
        model_max_length=tiny.POSITIONS,
    )
    if tokenizer.token_to_id(UNKNOWN) is not None:
        whole.unk_token = UNKNOWN
    whole.save_pretrained(directory)
    return directory


def _begun(made: Tokenizer) -> Tokenizer:
    made.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, made.token_to_id(BEGIN))]
    )
    return made


def _texts() -> Iterator[str]:
    for seed in range(8):
        yield from words(seed, 150)


def _without_added_bytes(made: Tokenizer) -> str:
    """Bytes are tokens of the model and not added ones, which would be looked for in texts."""
    rules = json.loads(made.to_str())
    rules["added_tokens"] = [one for one in rules["added_tokens"] if not one["content"].startswith("<0x")]
    return json.dumps(rules)
