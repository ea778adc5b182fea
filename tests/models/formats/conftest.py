"""Consumers in this process: gptqmodel would compile every layer with a C++ compiler, which tests have no use for."""

from collections.abc import Iterator

import pytest
import torch._dynamo
import transformers


@pytest.fixture(autouse=True, scope="session")
def _without_compiling() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    with torch._dynamo.config.patch(disable=True):
        yield
