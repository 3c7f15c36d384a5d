"""VAEs applied: videos of any length encoded and decoded in bounded memory, files of latents, evaluation of exported
VAEs, and decoding a run's samples with another VAE. Networks are in `jvgen.models`, their training in `jvgen.tasks`.
"""
