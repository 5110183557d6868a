"""Adapters of torch.nn's attention and transformer classes."""
