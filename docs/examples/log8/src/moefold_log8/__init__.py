"""The codec log8 for moefold, and its kernel."""
