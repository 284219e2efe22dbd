"""What tests of a chain need: worker pools, hashes of trees, simulated meshes, and the parity harness."""

from funczero.testing.hashes import tree_hash as tree_hash
from funczero.testing.parity import Report as Report
from funczero.testing.parity import parity as parity
from funczero.testing.pool import WorkerPool as WorkerPool
from funczero.testing.simulate import simulate as simulate
