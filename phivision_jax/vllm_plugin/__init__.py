"""A vLLM plugin that serves checkpoints of this model without remote code.

vLLM has the model (``Phi4ForCausalLMV``), but takes its configuration and processor from the released remote code,
which current versions of transformers cannot run; exports of this project have no remote code at all. The plugin
replaces both. vLLM finds it as an entry point of the installed package:

    pip install --no-deps phivision_jax        # in vLLM's environment; JAX is not needed there
    vllm serve HF_DIR

It imports nothing else of the package, so that it runs on every Python that vLLM supports.
"""

from transformers import AutoConfig, PreTrainedConfig
from vllm import ModelRegistry


class Phi4SiglipConfig(PreTrainedConfig):
    """The released ``config.json``; its values are attributes."""

    model_type = "phi4-siglip"


def register() -> None:
    """Register configuration and model; vLLM calls it in each of its processes."""
    AutoConfig.register(Phi4SiglipConfig.model_type, Phi4SiglipConfig, exist_ok=True)
    # By name: processes that vLLM forks later must not find CUDA initialised by an import of the model.
    ModelRegistry.register_model("Phi4ForCausalLMV", f"{__name__}.model:Phi4SiglipForCausalLM")
