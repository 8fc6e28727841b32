"""Memory of this process."""

import ctypes


def give_back_memory() -> None:
    """Of freed tensors, to the system: the allocator piles it up where sizes differ.

    Where the C library is not glibc, nothing happens.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
