"""MuseNet: a Sparse Transformer that writes music (OpenAI, 2019), on ``gdl_kernels.sparse_attention``."""
