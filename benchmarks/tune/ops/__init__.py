"""The passes at which each op's kernels are tuned, found by the op's name: at shapes of the models."""
