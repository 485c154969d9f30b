"""Names for trees of arrays: two trees have the same fingerprint if and only if they are the same bit for bit."""

import hashlib
import json
from typing import Any

import jax
import numpy as np


def fingerprint(tree: Any) -> str:
    """Returns 64 hex digits: SHA-256 over the path, type, shape and bytes of every leaf.

    Leaves are arrays, numbers, strings or None; dataclasses have to be turned into dicts before.
    """
    digest = hashlib.sha256()
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None)
    for path, leaf in sorted(((jax.tree_util.keystr(path), leaf) for path, leaf in leaves), key=lambda pair: pair[0]):
        if leaf is None or isinstance(leaf, str | bool | int | float):
            head, body = [path, type(leaf).__name__], json.dumps(leaf).encode()
        else:
            array = np.asarray(leaf)
            head, body = [path, array.dtype.str, array.shape], np.ascontiguousarray(array).tobytes()
        digest.update(json.dumps(head).encode() + b"\0" + len(body).to_bytes(8, "little") + body)
    return digest.hexdigest()
