"""GPT-2 on our kernels: the decoder, generation with a cache, and the weights of Hugging Face transformers."""
