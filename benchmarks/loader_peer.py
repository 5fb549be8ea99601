"""The other side of ``loader.py``: the image processors of transformers, in a separate environment.

Reads a JSON request per line from stdin and answers with a JSON line on stdout. It needs only Python 3.11 and imports
nothing of this project.

    {"do": "versions"}                                      versions and available processors
    {"do": "load", "files": [...]}                          read and decode the files
    {"do": "patches", "processor": "pil", "out": "x.npy"}   patches of all files [N, 768] f32
    {"do": "time", "processor": "pil", "decode": true, "which": [...]}   CPU seconds for those files
"""

from __future__ import annotations

import io
import sys
import time
from typing import Any

from peer_process import serve

try:
    import numpy as np
    import PIL
    import torch
    import transformers
    from PIL import Image
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
except ImportError as error:
    sys.exit(f"loader_peer.py needs transformers 5, torch and Pillow: {error}")

try:  # the default of AutoImageProcessor; needs torchvision
    import torchvision
    from transformers.models.siglip2.image_processing_siglip2 import Siglip2ImageProcessor
except (ImportError, RuntimeError):
    torchvision = Siglip2ImageProcessor = None

PATCH, MIN_PATCHES, MAX_PATCHES = 16, 256, 3600


class Peer:
    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.processors: dict[str, Any] = {"pil": Siglip2ImageProcessorPil()}
        if Siglip2ImageProcessor is not None:
            self.processors["torchvision"] = Siglip2ImageProcessor()
        self.files: list[bytes] = []
        self.decoded: list[Image.Image] = []

    def versions(self) -> dict[str, Any]:
        return {
            "processors": list(self.processors),
            "versions": {
                "python": sys.version.split()[0],
                "pillow": PIL.__version__,
                "numpy": np.__version__,
                "torch": torch.__version__,
                "torchvision": getattr(torchvision, "__version__", None),
                "transformers": transformers.__version__,
            },
        }

    def load(self, files: list[str]) -> dict[str, Any]:
        for name in files:
            with open(name, "rb") as file:
                self.files.append(file.read())
        self.decoded = [self.decode(content) for content in self.files]
        return {}

    def decode(self, content: bytes) -> Image.Image:
        return Image.open(io.BytesIO(content)).convert("RGB")

    def process(self, processor: str, image: Image.Image) -> Any:
        """Process an image as the released model does: its patch count follows its size within two bounds."""
        width, height = image.size
        patches = min(max((width // PATCH) * (height // PATCH), MIN_PATCHES), MAX_PATCHES)
        kind = "np" if processor == "pil" else "pt"  # the output that needs no conversion
        return self.processors[processor](images=image, max_num_patches=patches, return_tensors=kind)

    def patches(self, processor: str, out: str) -> dict[str, Any]:
        parts = []
        for image in self.decoded:
            result = self.process(processor, image)
            count = int(np.prod(np.asarray(result["spatial_shapes"])[0]))
            parts.append(np.asarray(result["pixel_values"])[0, :count])
        np.save(out, np.concatenate(parts))
        return {}

    def time(self, processor: str, decode: bool, which: list[int]) -> dict[str, Any]:
        start = time.process_time()
        for i in which:
            self.process(processor, self.decode(self.files[i]) if decode else self.decoded[i])
        return {"seconds": time.process_time() - start}


if __name__ == "__main__":
    serve(Peer())
