"""BERT on our kernels: the encoder, masked language modelling, and the weights of Hugging Face transformers."""
