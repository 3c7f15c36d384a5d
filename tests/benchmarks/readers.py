"""What our Loader does with an example in benchmarks. Worker processes import this, and nothing of PyTorch with it."""

from typing import Any

import numpy as np


def pixels(example: dict[str, Any]) -> dict[str, np.ndarray]:
    """Keep the pixels only."""
    return {"video": example["video"]}


def cached(example: dict[str, Any]) -> dict[str, np.ndarray]:
    """Keep the latents, and embeddings of the caption where there are any."""
    found = {"latents": example["latents"]}
    return found | ({"text": example["text"].view(np.uint16)} if "text" in example else {})
