"""What the GANs share: data, losses, the adversarial loop, scores, pictures, and their commands."""
