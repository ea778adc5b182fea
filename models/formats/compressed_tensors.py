"""compressed-tensors: what transformers and vLLM load. One directory may store its linears in several ways.

How a linear is stored follows from its scheme; `compressed_tensors_parts` says what its tensors are, and
`compressed_tensors_config` how `config.json` tells of them.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from models.files.checkpoint import SourceModel, read_config, tensor_entries
from models.files.safetensors_file import read as read_tensor
from models.formats.compressed_tensors_config import INTEGERS, NVFP4, entry_of, layout_name, quantization_config
from models.formats.compressed_tensors_parts import piece_of, restore
from models.formats.directory import pieces_of, skeleton_of, write_companions, write_config, written_whole
from models.formats.fitness import refuse_torn_groups, torn_fusions
from models.formats.shards import SHARD_BYTES, Piece, write_shards
from models.progress import Notify
from models.weights.codes import Encoded
from models.weights.quantized import QuantizedModel, Site
from squeeze.errors import FormatUnfit, GroupSizeIndivisible
from squeeze.steps.schemes import Scheme


def refuse(sites: Iterable[Site], schemes: Mapping[str, Scheme]) -> None:
    """Raises GroupSizeIndivisible or FormatUnfit where this format, or whoever loads it, can't hold these layers."""
    sites = list(sites)
    for site in sites:
        if site.transposed:
            _refuse_transposed(site, schemes[site.name])
        elif ".experts." in site.name:
            _refuse_expert(site, schemes[site.name])
    torn = next((site for site in sites if site.columns % schemes[site.name].columns(site.columns)), None)
    if torn is not None and schemes[torn.name].element == "float4":
        block = schemes[torn.name].group_size
        raise GroupSizeIndivisible(
            f"blocks of {block} don't divide the {torn.columns} inputs of {torn.name}: name it in `ignore`",
            param="ignore",
        )
    refuse_torn_groups(sites, schemes)
    experts = {schemes[site.name] for site in sites if ".experts." in site.name}
    if len(experts) > 1:
        raise FormatUnfit(
            "transformers and vLLM unpack all experts of a mixture by one rule; store them alike", param="formats"
        )
    kinds = {schemes[site.name] for site in sites}
    if len(kinds) > 1:
        unpacked = next((one for one in kinds if not one.symmetric), None)
        if unpacked is not None:
            raise FormatUnfit(
                "transformers can't load zero points from compressed-tensors where layers are stored in several ways; "
                "use symmetric codes, or the same for all layers",
                param="symmetric",
            )
        if any(site.transposed for site in sites):
            raise FormatUnfit(
                "transformers can't load transposed layers (Conv1D) from compressed-tensors where they are stored in "
                "several ways; use the same for all layers",
                param="formats",
            )


def write(
    source: SourceModel, quantized: QuantizedModel, out: Path, notify: Notify, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes a directory that `AutoModelForCausalLM.from_pretrained` and vLLM load as it is."""
    sites = quantized.sites
    refuse(sites.values(), quantized.schemes)
    if any(site.transposed for site in sites.values()):
        notify.event("warning", "vLLM will not load the result: it knows no transposed layers in compressed-tensors")
    for fusion in torn_fusions(sites, quantized.ignored, quantized.schemes):
        notify.event("warning", f"vLLM will not load the result: it fuses {fusion}, whose parts are not stored alike")
    skeleton = skeleton_of(source)
    ignore = [name for name in skeleton.linears if name not in sites]
    if source.row.head_alias and "lm_head" in ignore:
        ignore.append(source.row.head_alias)  # vLLM goes by the name in the files

    def site_piece(site: Site) -> Piece:
        return piece_of(quantized, site)

    with written_whole(out) as partial:
        write_companions(source, partial)
        write_config(source, quantized, quantization_config(quantized, ignore), partial)
        write_shards(partial, pieces_of(source, skeleton, quantized, site_piece), notify, shard_bytes)


def read(out: Path, module: str) -> Encoded:
    """The codes of one layer, from what `write` wrote."""
    entries = tensor_entries(out)

    def tensor(part: str) -> Tensor:
        return read_tensor(entries[f"{module}.{part}"])

    return restore(tensor, entry_of(read_config(out)["quantization_config"], module))


def _refuse_transposed(site: Site, scheme: Scheme) -> None:
    """transformers unpacks such layers as it loads them, and then knows nothing of activations; blocks of E2M1 lie
    along the last axis, which here is that of the outputs.
    """
    if scheme.activations is not None:
        raise FormatUnfit(
            f"{site.name} keeps its weight transposed (Conv1D), and transformers rounds no activations of such layers; "
            "methods that round weights alone can be used: rtn or gptq at 8 bits, or fp8 with activations `none`",
            param="activations",
        )
    if scheme.element == "float4":
        raise FormatUnfit(
            f"{site.name} keeps its weight transposed (Conv1D), and compressed-tensors has no blocks of four-bit "
            "floats along its inputs; rtn or gptq at 4 bits can be used",
            param="method",
        )


def _refuse_expert(site: Site, scheme: Scheme) -> None:
    """transformers 5.23 unpacks experts as it loads them, by code of its own that knows neither bare integers nor the
    one scale over NVFP4's blocks.
    """
    if layout_name(scheme) in (INTEGERS, NVFP4):
        raise FormatUnfit(
            f"{site.name} is an expert of a mixture, and transformers can't load those from {layout_name(scheme)}; "
            "fp8, mxfp4, or integers of weights alone (rtn, gptq) can be used, or name `*.experts.*` in `ignore`",
            param="method",
        )
