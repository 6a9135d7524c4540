"""Networks: the diffusion transformers and the baselines they are measured against."""
