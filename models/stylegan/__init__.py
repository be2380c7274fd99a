"""StyleGAN: a style-based generator (arXiv 1812.04948)."""
