"""Optimizers as optax-shaped pairs, one a file; the fused form is torch's kernel on whole buffers."""

from funczero.optim.adamw import AdamW as AdamW
from funczero.optim.adamw import adamw as adamw
from funczero.optim.lift import lift as lift
from funczero.optim.sgd import SGD as SGD
from funczero.optim.sgd import sgd as sgd
