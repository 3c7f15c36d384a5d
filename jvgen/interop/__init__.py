"""To and from PyTorch: folders of diffusers and transformers, SAT files, safetensors, strict verification with the
original classes. Which parameter has which name is said by each model's `torch_map`.
"""
