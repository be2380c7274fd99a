"""ProGAN: progressive growing of GANs (arXiv 1710.10196)."""
