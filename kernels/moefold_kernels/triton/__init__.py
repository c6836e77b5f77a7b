"""Triton kernels over exponent-packed experts; its modules need triton, `import moefold_kernels` does not."""
