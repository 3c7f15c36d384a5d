"""Where arrays lie: logical axes, the mesh, the rules that map one to the other, and what is known of chips.

No layer and no training loop.
"""
