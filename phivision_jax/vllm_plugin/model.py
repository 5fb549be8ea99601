"""vLLM's model with a processor that needs no remote code."""

from typing import Any

import torch
from torch.nn.functional import pad
from transformers import BatchFeature, PreTrainedConfig
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from vllm.model_executor.models import phi4siglip
from vllm.multimodal import MULTIMODAL_REGISTRY


class ImageProcessor:
    """Images as the released processor patches them: as many patches as fit the image, between two limits."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self._range = config.min_num_patches, config.max_num_patches
        self._patch_size = config.vision_config.get("patch_size", 16)
        self._siglip2 = Siglip2ImageProcessorPil(patch_size=self._patch_size)

    def __call__(self, text: Any = None, images: Any = (), **_: Any) -> BatchFeature:
        """Padded patches, their masks and grids of RGB images; the text is tokenized by vLLM."""
        least, most = self._range
        found: dict[str, list[torch.Tensor]] = {}
        for image in images:
            width, height = image.size
            target = min(max((width // self._patch_size) * (height // self._patch_size), least), most)
            for name, value in self._siglip2(image, max_num_patches=target, return_tensors="pt").items():
                if name != "spatial_shapes":  # patches or their mask: vLLM stacks images of different sizes
                    value = pad(value, (0, 0) * (value.dim() - 2) + (0, most - target))
                found.setdefault(name, []).append(value)
        return BatchFeature({name: torch.cat(values) for name, values in found.items()})


class ProcessingInfo(phi4siglip.Phi4SiglipProcessingInfo):
    """vLLM's description of the model's inputs, with the processor above."""

    def get_hf_processor(self, **_: Any) -> Any:
        _set_image_token(self.get_hf_config())
        return ImageProcessor(self.get_hf_config())


@MULTIMODAL_REGISTRY.register_processor(
    phi4siglip.Phi4SiglipMultiModalProcessor,
    info=ProcessingInfo,
    dummy_inputs=phi4siglip.Phi4SiglipDummyInputsBuilder,
)
class Phi4SiglipForCausalLM(phi4siglip.Phi4ForCausalLMV):
    """vLLM's model."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        _set_image_token(vllm_config.model_config.hf_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)


def _set_image_token(config: PreTrainedConfig) -> None:
    """Let the padding token mark vision tokens: vLLM's choice, 100256, is not in every vocabulary."""
    if config.pad_token_id is not None:
        phi4siglip._IMAGE_TOKEN_ID = config.pad_token_id
