"""A CogVideoX pipeline's folder as small as they come, with random weights and a tokenizer of a few words."""

import json
from pathlib import Path

import numpy as np
import tokenizers

from jvgen.interop.formats import format_of
from jvgen.interop.to_torch import export_networks
from jvgen.models.cogvideox_vae.config import CogVideoXVAEConfig
from jvgen.models.t5.config import T5Config
from jvgen.models.video_dit.config import VideoDiTConfig
from jvgen.nested import map_with_path

FIELDS = {
    "layers": 1, "heads": 2, "head_width": 8, "in_channels": 4, "out_channels": 4, "text_width": 8, "text_length": 6,
    "condition_width": 16, "sample_height": 4, "sample_width": 6, "sample_frames": 3,
}  # fmt: skip
TEXT = {"vocabulary": 16, "width": 8, "layers": 1, "heads": 1, "head_width": 8, "hidden": 8}
DENOISER, ENCODER = VideoDiTConfig(**FIELDS), T5Config(**TEXT)
VAE = CogVideoXVAEConfig.tiny().replace(
    block_channels=(4, 4), groups=2, temporal_downsampling=2, sample_height=24, sample_width=20
)
SCHEDULER = {
    "_class_name": "CogVideoXDDIMScheduler", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
    "snr_shift_scale": 3.0, "timestep_spacing": "trailing",
}  # fmt: skip


def write_pipeline(folder: Path, denoiser: VideoDiTConfig = DENOISER) -> Path:
    """Write one with this denoiser; returns the folder."""
    rng = np.random.default_rng(0)
    configs = {"transformer": denoiser, "vae": VAE, "text_encoder": ENCODER}
    parameters = {
        name: map_with_path(
            lambda path, leaf: 0.2 * rng.standard_normal(leaf.shape, np.float32),
            format_of(config).network(config).shapes,
        )
        for name, config in configs.items()
    }
    export_networks(configs, parameters, folder, files={"scheduler/scheduler_config.json": json.dumps(SCHEDULER)})
    words = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", "a", "red", "ball", "blue"])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    (folder / "tokenizer").mkdir()
    model.save(str(folder / "tokenizer" / "tokenizer.json"))
    return folder
