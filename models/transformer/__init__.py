"""Transformer: an encoder and a decoder, and harmony as a task for them."""
