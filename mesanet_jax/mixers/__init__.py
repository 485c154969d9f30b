"""Token mixers, one file each, under one contract.

A mixer is a Flax module over the config whose call takes (x [b, t, d], state or None, segment_ids or None) and returns
(y [b, t, d], state). Cutting a sequence anywhere and carrying the state changes nothing.
"""

from mesanet_jax.mixers.attention import Attention, SlidingWindowAttention
from mesanet_jax.mixers.mesa import Mesa

MIXERS = {"mesa": Mesa, "attention": Attention, "sliding_window": SlidingWindowAttention}
