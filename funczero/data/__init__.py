"""The floor of rows: a text corpus, and batches of any dataset, as functions of (seed, step).

Right of `step`; `funczero.data` is the public name.
"""

from funczero.data.corpus import Corpus as Corpus
from funczero.data.corpus import Piece as Piece
from funczero.data.corpus import batch as batch
from funczero.data.corpus import load as load
from funczero.data.corpus import read as read
from funczero.data.corpus import sample_batches as sample_batches
from funczero.data.corpus import standard_library as standard_library
from funczero.data.corpus import text_files as text_files
from funczero.data.corpus import unigram_entropy as unigram_entropy
from funczero.data.dataset import Batches as Batches
from funczero.data.dataset import Row as Row
from funczero.data.dataset import epoch_order as epoch_order
