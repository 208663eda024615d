"""Named random generators: adding a client or a trial does not change the draws of another one."""

import hashlib

import torch


def derive(seed: int, *names: str | int) -> torch.Generator:
    """Return a CPU generator that depends on the seed and on all names, in their order, and on nothing else.

    Its seed is the start of sha256("seed/name/name"), the same on every machine (Python's own ``hash`` is not). Torch's
    CPU generator uses 32 bits of it, so two of n generators agree with a chance of about n^2 / 2^33, which is one in
    ten thousand for a thousand generators. A slash in a name, which would make ("a/b",) and ("a", "b") the same, raises
    ValueError.
    """
    for name in names:
        if "/" in str(name):
            raise ValueError(f"seed name {name!r} contains '/'; pass its parts as separate names")
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
