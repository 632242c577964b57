"""From the weights of a CSPNet-family model to files that an edge application can drop in and trust."""

__version__ = "0.1.0"
