"""The step that rounds a base for adapters: which trainings have one, and its groups."""

import pytest

from squeeze.specs.bases import base_of, rounding
from squeeze.steps.quantization import GPTQ, GroupSize
from squeeze.steps.training import Train
from tests.squeeze.making import llama, training


def step_of(**fields: object) -> Train:
    (step,) = training({"method": "qlora", "base": "gptq"} | fields).steps
    assert isinstance(step, Train)
    return step


@pytest.mark.parametrize(
    ("columns", "group_size"), [((256, 640), 128), ((128, 192), 64), ((96, 256), 32), ((80, 256), "channel")]
)
def test_its_groups_are_the_largest_that_divide_all_inputs(columns: tuple[int, ...], group_size: GroupSize) -> None:
    assert rounding(step_of(), columns) == GPTQ(method="gptq", bits=4, group_size=group_size)
    assert rounding(step_of(group_size=32), columns) == GPTQ(method="gptq", bits=4, group_size=32)


def test_other_trainings_have_none() -> None:
    for fields in ({"base": "nf4"}, {"base": "int8"}):
        assert rounding(step_of(**fields), (128,)) is None
    spec = training()
    assert base_of(llama(), spec, spec.steps[0]) is None  # type: ignore[arg-type] # it trains
