"""Optimizers as optax-shaped pairs, one a file; the fused form is torch's kernel on whole buffers."""

from funczero.optim.adafactor import Adafactor as Adafactor
from funczero.optim.adafactor import adafactor as adafactor
from funczero.optim.adagrad import Adagrad as Adagrad
from funczero.optim.adagrad import adagrad as adagrad
from funczero.optim.adamw import AdamW as AdamW
from funczero.optim.adamw import adam as adam
from funczero.optim.adamw import adamw as adamw
from funczero.optim.from_torch import FromTorch as FromTorch
from funczero.optim.from_torch import from_torch as from_torch
from funczero.optim.lamb import Lamb as Lamb
from funczero.optim.lamb import lamb as lamb
from funczero.optim.lars import Lars as Lars
from funczero.optim.lars import lars as lars
from funczero.optim.lift import lift as lift
from funczero.optim.lion import Lion as Lion
from funczero.optim.lion import lion as lion
from funczero.optim.muon import Muon as Muon
from funczero.optim.muon import muon as muon
from funczero.optim.sgd import SGD as SGD
from funczero.optim.sgd import sgd as sgd
from funczero.optim.shampoo import Shampoo as Shampoo
from funczero.optim.shampoo import shampoo as shampoo
from funczero.optim.shapes import matrices as matrices
from funczero.optim.soap import Soap as Soap
from funczero.optim.soap import soap as soap
