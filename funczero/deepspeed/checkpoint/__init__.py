"""`deepspeed.checkpoint`: what programs do with values before they save them by themselves."""

from funczero.deepspeed.checkpoint import utils as utils
