__version__ = "0.1.0"

from .granularity import NM, Coupled, Granularity, available_granularities, register_layer
from .patterns import Block, has_pattern, pattern_breaks
from .criteria import *
from .method import available_methods
from .schedule import *
from .report import SparsityReport, sparsity_report
from .evidence import register_inputs
from .plan import MACs, Params, SparsityWarning, erk
from .sparsifier import Sparsifier
from .plot import *
from .flow import flow
from .compact import Compacted, compact, rebuild
from .repair import obs, sparsegpt
from .files import load_sparse, save_sparse
