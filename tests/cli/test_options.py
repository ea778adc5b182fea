"""Options of the command line follow from the fields of the wire types."""

from typing import ClassVar, Literal

import click
import pytest
from click.testing import CliRunner
from pydantic import BaseModel, Field

from squeeze import Client
from squeeze.cli import main
from squeeze.cli.options import option, step_options
from squeeze.cli.submit import checked, spec_of, spec_parameters
from squeeze.errors import SpecInvalid
from squeeze.steps.every import STEPS, tag_of
from squeeze.steps.quantization import METHODS, Grouped, Quantize


class Wanda(Quantize):
    """A method that the command line has never heard of."""

    method: Literal["wanda"]
    share: float = Field(0.5, gt=0, lt=1, description="Share of the weights that go.")
    pattern: Literal["2:4", "4:8"] | None = None
    student: dict[str, int] | None = None
    layers: tuple[int, ...] = ()
    needs_calibration: ClassVar[bool] = True


def named(methods: list[type[BaseModel]]) -> dict[str, click.Option]:
    return {str(one.name): one for one in step_options(methods)}


def test_every_parameter_of_every_method_is_an_option_with_its_description() -> None:
    for method in STEPS:
        kind = tag_of(method).split(".")[0]
        shown = CliRunner().invoke(main, [kind, "--help"], terminal_width=4000).output
        for name, field in method.model_fields.items():
            if name not in ("kind", "method"):
                assert f"--{name.replace('_', '-')}" in shown
                assert (field.description or "").replace("`", "") in shown


def test_a_new_method_brings_its_options_along_with_types_bounds_and_who_takes_them() -> None:
    options = named([*METHODS, Wanda])
    share = options["share"]
    assert isinstance(share.type, click.FloatRange)
    assert (share.type.min, share.type.max, share.type.min_open, share.type.max_open) == (0, 1, True, True)
    assert share.help == "Share of the weights that go. [wanda only; default: 0.5]"
    context = click.Context(click.Command("x"))
    assert options["pattern"].type.convert("2:4", None, context) == "2:4"
    assert options["student"].type.convert('{"layers": 12}', None, context) == {"layers": 12}
    assert options["layers"].multiple and isinstance(options["layers"].type, click.IntRange)
    assert "only" not in (options["ignore"].help or "")


def test_numbers_and_words_of_one_literal_keep_their_types() -> None:
    kind = option("group_size", Grouped.model_fields["group_size"]).type
    assert kind.convert("128", None, None) == 128
    assert kind.convert("channel", None, None) == "channel"
    with pytest.raises(click.BadParameter, match="32, 64, 128, channel"):
        kind.convert("100", None, None)


def test_what_the_user_left_out_is_left_to_the_service() -> None:
    command = click.Command("quantize", params=spec_parameters(METHODS))
    typed = command.make_context("quantize", ["org/name", "--method", "gptq"]).params
    with Client("http://127.0.0.1:1") as client:
        spec = spec_of(client, typed, METHODS)
    assert spec.model_fields_set == {"model", "steps"}
    assert spec.steps[0].model_fields_set == {"kind", "method"}


def test_a_parameter_of_another_method_is_refused_by_its_option() -> None:
    step = {"kind": "quantize", "method": "rtn", "damping": 0.1}
    with pytest.raises(SpecInvalid, match="--damping: rtn takes none"):
        checked({"model": "org/name", "steps": [step]})
