"""Token mixers, one file each, under one contract.

A mixer is a Flax module over the config whose call takes (x [b, t, d], state or None, segment_ids or None) and returns
(y [b, t, d], state). Cutting a document anywhere and carrying the state changes nothing: the state belongs to the first
document of the call. What comes out where there is padding means nothing.
"""

from mesanet_jax.mixers.attention import Attention, SlidingWindowAttention
from mesanet_jax.mixers.deltanet import DeltaNet
from mesanet_jax.mixers.gated_deltanet import GatedDeltaNet
from mesanet_jax.mixers.gla import GatedLinearAttention
from mesanet_jax.mixers.hawk import Hawk
from mesanet_jax.mixers.mamba2 import Mamba2
from mesanet_jax.mixers.mesa import Mesa
from mesanet_jax.mixers.mlstm import MLSTM

MIXERS = {
    "mesa": Mesa,
    "gla": GatedLinearAttention,
    "mamba2": Mamba2,
    "mlstm": MLSTM,
    "deltanet": DeltaNet,
    "gated_deltanet": GatedDeltaNet,
    "hawk": Hawk,
    "sliding_window": SlidingWindowAttention,
    "attention": Attention,
}
