"""LoRA files of diffusers, ComfyUI, kohya and the original code, read and written without loss."""

from vflora.models.lora_formats.adapters import apply_lora, from_transformer, set_scale
from vflora.models.lora_formats.header import build_header, thumbnail_uri
from vflora.models.lora_formats.reading import FORMATS, LoraFormat, from_state_dict, read_lora, recognise
from vflora.models.lora_formats.reference_dcp import is_dcp, read_reference_dcp
from vflora.models.lora_formats.weights import LoraModule, LoraWeights
from vflora.models.lora_formats.writing import lora_file, to_state_dict, write_lora

__all__ = [
    "FORMATS",
    "LoraFormat",
    "LoraModule",
    "LoraWeights",
    "apply_lora",
    "build_header",
    "from_state_dict",
    "from_transformer",
    "is_dcp",
    "lora_file",
    "read_lora",
    "read_reference_dcp",
    "recognise",
    "set_scale",
    "thumbnail_uri",
    "to_state_dict",
    "write_lora",
]
