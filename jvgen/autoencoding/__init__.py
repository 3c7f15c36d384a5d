"""Applying VAEs: encode and decode videos of any length in bounded memory, files of latents, fidelity of exported
VAEs. Training a VAE is a task (`jvgen.tasks`), its network is in `jvgen.models`.
"""
