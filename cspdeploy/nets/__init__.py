"""Networks in PyTorch: the CSPNet family, its registry and its weights."""
