"""REAM (arXiv 2604.04356) for moefold: saliency, similarity and pairs."""
