"""BigGAN: class-conditional images (arXiv 1809.11096), and its deep variant."""
