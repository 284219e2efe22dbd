"""What tests of a chain need: worker pools, hashes of trees, simulated meshes, and the parity harness."""

from funczero.parity import Report as Report
from funczero.parity import parity as parity
from funczero.pool import WorkerPool as WorkerPool
from funczero.pool import tree_hash as tree_hash
from funczero.simulate import simulate as simulate
