"""The encoder of T5 v1.1 and its tokenizer, as CogVideoX uses them."""
