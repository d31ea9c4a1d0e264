"""Networks that judge pictures: discriminators, perceptual distances, their backbones."""
