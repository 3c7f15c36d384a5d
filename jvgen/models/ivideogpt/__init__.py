"""iVideoGPT (arXiv 2405.15223): compressive video tokens and an autoregressive transformer with actions and rewards."""
