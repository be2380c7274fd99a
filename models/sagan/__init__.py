"""SAGAN: a GAN with self-attention and spectral norm (arXiv 1805.08318)."""
