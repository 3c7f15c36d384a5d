"""iVideoGPT (arXiv 2405.15223): a compressive video tokenizer, a transformer over its tokens with actions and rewards,
and both together as a world model in pure functions.

Acting in a world (checks of input, compiled calls, gymnasium) is in `jvgen.control`, training in `jvgen.tasks`.
"""
