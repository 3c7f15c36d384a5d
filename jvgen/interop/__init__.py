"""To and from PyTorch: folders of diffusers and transformers, SAT files, safetensors, strict verification with the
original classes. The tensor names of each network are in its `torch_map`.
"""
