"""Which block type every linear of a model gets, by the names that llama.cpp has for them."""

from collections.abc import Iterable

import gguf

from models.files.checkpoint import SourceModel
from models.formats.gguf_families import config_of, family_of, heads_of, tensor_name
from models.ggml.blocks import scheme_of
from models.ggml.mixture import Build, block_type
from models.ggml.types import FLOATS
from models.weights.quantized import Site
from squeeze.steps.quantization import Mixture
from squeeze.steps.schemes import Scheme


def schemes_of_mixture(source: SourceModel, sites: Iterable[Site], mixture: Mixture) -> dict[str, Scheme]:
    """Schemes by the names of sites; without those whose rows no block fits, which stay in 16 bits.

    Raises FormatUnfit where llama.cpp does not compute this model.
    """
    config = config_of(source)
    family, heads = family_of(config), heads_of(config)
    names = gguf.get_tensor_name_map(family.arch, config.num_hidden_layers)
    build = Build(
        family.name,
        config.num_hidden_layers,
        heads.queries // heads.keys,
        getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0,
        source.file_key("lm_head.weight") is None and not family.own_head,
    )
    found: dict[str, Scheme] = {}
    for site in sites:
        name = block_type(mixture, tensor_name(names, f"{site.name}.weight", source, config), site.columns, build)
        if name not in FLOATS:
            found[site.name] = scheme_of(name)
    return found
