"""`deepspeed.utils.logging`: the logger, and a line of some ranks."""

from funczero.deepspeed.engine.access import log_dist as log_dist
from funczero.deepspeed.engine.access import logger as logger
