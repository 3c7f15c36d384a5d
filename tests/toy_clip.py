"""A CLIP model of random weights and few words, as a folder that `jvgen.evaluation.clip.Clip` reads; needs no torch."""

import json
from pathlib import Path

import numpy as np
import tokenizers
from safetensors.numpy import save_file

WORDS = ("<start>", "a", "red", "green", "blue", "ball", "cube", "moves", "to", "the", "left", "right", "<end>")
WIDTH, HIDDEN, LAYERS, HEADS, FEATURES, POSITIONS, SIDE, PATCH = 16, 24, 2, 2, 8, 9, 16, 8


def write_toy_clip(folder: Path, seed: int = 0) -> Path:
    """Write the folder and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    both = {
        "hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS
    }  # fmt: skip
    end = WORDS.index("<end>")
    text = {**both, "vocab_size": len(WORDS), "max_position_embeddings": POSITIONS, "eos_token_id": end}
    config = {
        "architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": FEATURES, "text_config": text,
        "vision_config": {**both, "image_size": SIDE, "patch_size": PATCH},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    rng, tensors = np.random.default_rng(seed), {}

    def add(name: str, *shape: int) -> None:
        tensors[name] = (0.3 * rng.standard_normal(shape)).astype(np.float32)

    def pair(name: str, *shape: int) -> None:
        add(f"{name}.weight", *shape)
        add(f"{name}.bias", shape[0])

    add("text_model.embeddings.token_embedding.weight", len(WORDS), WIDTH)
    add("text_model.embeddings.position_embedding.weight", POSITIONS, WIDTH)
    add("vision_model.embeddings.class_embedding", WIDTH)
    add("vision_model.embeddings.patch_embedding.weight", WIDTH, 3, PATCH, PATCH)
    add("vision_model.embeddings.position_embedding.weight", (SIDE // PATCH) ** 2 + 1, WIDTH)
    norms = ("text_model.final_layer_norm", "vision_model.pre_layrnorm", "vision_model.post_layernorm")
    for tower in ("text_model", "vision_model"):
        for layer in range(LAYERS):
            prefix = f"{tower}.encoder.layers.{layer}"
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                pair(f"{prefix}.self_attn.{name}", WIDTH, WIDTH)
            pair(f"{prefix}.mlp.fc1", HIDDEN, WIDTH)
            pair(f"{prefix}.mlp.fc2", WIDTH, HIDDEN)
            norms += (f"{prefix}.layer_norm1", f"{prefix}.layer_norm2")
    for name in norms:
        pair(name, WIDTH)
    add("text_projection.weight", FEATURES, WIDTH)
    add("visual_projection.weight", FEATURES, WIDTH)
    tensors["logit_scale"] = np.array(2.6, np.float32)
    save_file(tensors, folder / "model.safetensors")
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", end)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
