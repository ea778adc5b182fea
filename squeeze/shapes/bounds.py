"""Which numbers would do, as an error says it."""


def can_be(field: str, least: int, most: int, by: int = 1) -> str:
    """The numbers from `least` to `most`, at least one, every `by`-th of them: "`heads` can only be 2 here"."""
    if most < least + by:
        return f"`{field}` can only be {least} here"
    steps = f" in steps of {by}" if by > 1 else ""
    return f"`{field}` can be from {least} to {most}{steps}"
