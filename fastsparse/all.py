"Everything that a notebook needs, in one import"
from .granularity import NM, Coupled, Granularity, available_granularities, register_layer
from .patterns import Block, has_pattern, pattern_breaks
from .criteria import *
from .method import Owl, available_methods
from .schedule import *
from .report import SparsityReport, sparsity_report
from .evidence import register_inputs
from .grow import Regrow, available_growths, drop_and_grow
from .plan import Count, MACs, Params, SparsityWarning, erk
from .allocation import Bounded, uniform
from .ends import ends, first_layer, last_layer
from .sparsifier import Sparsifier
from .plans import PlanSparsifier
from .plot import *
from .flow import flow
from .compact import Compacted, compact, rebuild
from .repair import obs, sparsegpt
from .files import load_sparse, save_sparse
from .accelerate import Accelerated, SparseConv, SparseLinear, accelerate
from .benchmark import Benchmark, benchmark
from .export import OnnxFile, OnnxModel, export_onnx, fake_int8, quantize_onnx
from .callback import KeepSparsityCallback, SparsifyCallback
from . import learner as _learner # learn.compact(), learn.export_onnx()
from .distill import DistillCallback
from .sensitivity import sensitivity
from .tickets import lottery_ticket
