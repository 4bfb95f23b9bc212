"""Passes over one torch.fx graph of the decoder layer: trace -> autodiff -> prune -> remat -> emit."""
