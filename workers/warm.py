"""Imports, once and before any fork, what transformers and the pipeline would only import when a job first needs it.

Seconds for every job otherwise. Modules alone: nothing here may run an operation of torch's or look at a GPU.
"""

import importlib

from transformers.models.auto.configuration_auto import model_type_to_module_name

from squeeze.shapes.architectures import ARCHITECTURES
from squeeze.specs.formats import CAPACITIES
from squeeze.steps.compressing import Compress
from squeeze.steps.every import STEPS, tag_of

importlib.import_module("transformers.models.auto.modeling_auto")
importlib.import_module("transformers.models.auto.tokenization_auto")
for _name in map(model_type_to_module_name, ARCHITECTURES):
    importlib.import_module(f"transformers.models.{_name}.modeling_{_name}")
for _format, _capacity in CAPACITIES.items():
    if _capacity.held:
        importlib.import_module(f"models.formats.{_format.replace('-', '_')}")
for _method in STEPS:
    if issubclass(_method, Compress):  # what trains is imported by the jobs that do: peft takes 100 MB
        importlib.import_module(f"models.{tag_of(_method)}")
