"""Memory that the C library holds on to."""

import ctypes


def release_free_memory() -> None:
    """Give freed memory back to the system where the C library can (glibc's malloc_trim), otherwise do nothing.

    Activations of all sizes come and go around those that are kept: the heap is full of holes after every forward pass.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
