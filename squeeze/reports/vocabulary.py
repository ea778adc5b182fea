"""The report's part on a vocabulary that was trimmed."""

from pydantic import Field

from squeeze.reports.parts import Part


class Corpus(Part):
    """The text that the vocabulary was trimmed to, all of it."""

    origin: str
    texts: int = Field(description="Records in each way that they are read, as chats with and without the template.")
    bytes: int
    tokens: int
    sha256: str = Field(description="Of all texts, each behind its length (8 bytes, little-endian).")
    decoded_to_themselves: int = Field(
        description="Texts that decode to themselves; the others don't with the original tokenizer either, and decode "
        "to the same."
    )
    new_share: float = Field(
        description="Estimated share of tokens in further text of the same kind that are not in this one: that of the "
        "tokens that it has once (Good, 1953)."
    )


class Unseen(Part):
    """The evaluation text, where it is another than what the vocabulary was trimmed to."""

    origin: str
    bytes: int
    tokens_before: int
    tokens_after: int = Field(description="What is left out is told in smaller tokens.")
    covered: float = Field(description="Share of `tokens_before` that stayed.")
    measured_bytes: int = Field(description="Of the passages that both models were measured on.")
    bits_per_byte_before: float = Field(
        description="What a byte of these passages costs the model; a token's perplexity says nothing where the tokens "
        "are others."
    )
    bits_per_byte_after: float


class Trimming(Part):
    """What was left out of a vocabulary, and what that changed."""

    rows_before: int = Field(description="Of the embedding.")
    rows_after: int
    tokens_before: int = Field(description="Of the tokenizer; a model may have more rows.")
    tokens_after: int
    found: int = Field(description="Tokens that the text has.")
    parts: int = Field(description="Tokens that these are merged from, without being in the text themselves.")
    always: int = Field(description="Bytes, special and added tokens, those of `keep` and of settings, beyond these.")
    filled: int = Field(description="Tokens beyond these, up to the size or to the multiple.")
    corpus: Corpus
    largest_difference: float = Field(
        description="Between the logits of both models for the same token, over all tokens that stayed, at "
        "`compared_positions` of the text."
    )
    compared_positions: int
    left_out_probability: float = Field(
        description="That the original gives to tokens that are left out, mean over the same positions; the result has "
        "it shared among the others."
    )
    bits_per_byte_before: float = Field(description="Of the same positions of the text.")
    bits_per_byte_after: float
    unseen: Unseen | None
    left_out_files: list[str] = Field(
        description="Of the original's, which tell the tokenizer in another way and can't be written anew; "
        "tokenizer.json says all that they do."
    )
