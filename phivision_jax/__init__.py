"""phivision_jax: Phi-4-reasoning-vision in JAX.

model, processor = phivision_jax.load("path/to/checkpoint")
answer = phivision_jax.generate(model, processor, "What is in the image?", images="photo.jpg")

graphdef, params = model.split()  # plain dicts
loss, sums = phivision_jax.batch_loss(phivision_jax.merge(graphdef, params), batch)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phivision_jax.batch import Batch as Batch
    from phivision_jax.checkpoint.loading import load as load
    from phivision_jax.config import ModelConfig as ModelConfig
    from phivision_jax.inference.generate import generate as generate
    from phivision_jax.models.phivision import merge as merge
    from phivision_jax.processor import Processor as Processor
    from phivision_jax.rows import batch_from_ids as batch_from_ids
    from phivision_jax.training.loss import batch_loss as batch_loss
    from phivision_jax.training.run import train as train
    from phivision_jax.training.run_config import RunConfig as RunConfig

__version__ = "0.1.0"

_MODULES = {
    "Batch": "batch",
    "ModelConfig": "config",
    "Processor": "processor",
    "RunConfig": "training.run_config",
    "batch_from_ids": "rows",
    "batch_loss": "training.loss",
    "generate": "inference.generate",
    "load": "checkpoint.loading",
    "merge": "models.phivision",
    "train": "training.run",
}
__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    # Imported on first use: reading a configuration or patching an image must not wait for the model.
    if name in _MODULES:
        return getattr(importlib.import_module(f"phivision_jax.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'phivision_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
