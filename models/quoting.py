"""What other people's libraries say, made fit to be shown: one line, without secrets and paths of this machine."""

import re

SECRET_VALUES = re.compile(r"\b(hf_|sk-|sq-|ghp_|AKIA)[\w-]{8,}|://[^/\s:@]+:[^/\s@]+@")
DIRECTORIES = re.compile(r"(?<![\w:/])/(?:[\w.@+-]+/)+")


def quoted(message: object, most: int = 1000) -> str:
    """At most `most` characters of a message; of an exception its class as well."""
    text = f"{type(message).__name__}: {message}" if isinstance(message, BaseException) else str(message)
    line = SECRET_VALUES.sub("…", " ".join(text.split()))
    return DIRECTORIES.sub("…/", line)[:most]
