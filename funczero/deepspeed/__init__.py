"""DeepSpeed's configuration file and its engine over the same chain: `import funczero.deepspeed as deepspeed`."""

from funczero.deepspeed.build import Rates as Rates
from funczero.deepspeed.build import chain_of as chain_of
from funczero.deepspeed.build import from_deepspeed as from_deepspeed
from funczero.deepspeed.build import on_values as on_values
from funczero.deepspeed.build import optimizer_of as optimizer_of
from funczero.deepspeed.build import rates_of as rates_of
from funczero.deepspeed.comm import init_distributed as init_distributed
from funczero.deepspeed.config import Config as Config
from funczero.deepspeed.config import Value as Value
from funczero.deepspeed.config import resolve as resolve
from funczero.deepspeed.engine import Engine as Engine
from funczero.deepspeed.entry import initialize as initialize
from funczero.deepspeed.explain import diff as diff
from funczero.deepspeed.explain import differences as differences
from funczero.deepspeed.keys import KEYS as KEYS
from funczero.deepspeed.keys import ConfigError as ConfigError
from funczero.deepspeed.keys import Key as Key
from funczero.deepspeed.triad import Triad as Triad
from funczero.deepspeed.triad import World as World

DeepSpeedEngine = Engine
