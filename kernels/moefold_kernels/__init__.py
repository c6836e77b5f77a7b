"""Packed experts: where each bit is, what each operation means, and who carries it out. Needs torch only.

After `import moefold_kernels`, stock transformers loads packed checkpoints (see registration.py).
"""

from moefold_kernels.backend import Answer, Backend, Need, Reference, ask, builtin, choose
from moefold_kernels.checkpoint import LayerEntry, PackedLayer, read_config, write_config
from moefold_kernels.entry import MergedLayer
from moefold_kernels.errors import BackendError, FormatError, KernelsError
from moefold_kernels.reading import fuse, read_layer
from moefold_kernels.reference import PackedExperts, decode, decode_pairs, encode, experts
from moefold_kernels.registration import arm

__all__ = [
    "Answer",
    "Backend",
    "BackendError",
    "FormatError",
    "KernelsError",
    "LayerEntry",
    "MergedLayer",
    "Need",
    "PackedExperts",
    "PackedLayer",
    "Reference",
    "ask",
    "builtin",
    "choose",
    "decode",
    "decode_pairs",
    "encode",
    "experts",
    "fuse",
    "read_config",
    "read_layer",
    "write_config",
]

arm()
