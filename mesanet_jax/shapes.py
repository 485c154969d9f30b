"""The legend of axis letters, then the arrays that have a name.

b  batch            t  time             d  model            f  feed-forward
h  heads            k  key              v  value            y  vocabulary
s  slots of an attention cache          w  taps of the short convolution
l  layers           a  micro-batches of one optimizer step
"""

from jaxtyping import Array, Float, Int

Tokens = Int[Array, "b t"]
SegmentIds = Int[Array, "b t"]  # number of the document a token belongs to; negative marks padding
Activations = Float[Array, "b t d"]
Gates = Float[Array, "b t h"]
Logits = Float[Array, "b t y"]
