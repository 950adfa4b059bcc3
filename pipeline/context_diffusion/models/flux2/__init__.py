"""FLUX.2 [klein] as a backbone."""
