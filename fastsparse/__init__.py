__version__ = "0.1.0"

from .granularity import *
from .criteria import *
from .method import *
from .schedule import *
from .report import *
from .plan import *
from .sparsifier import *
from .plot import *
