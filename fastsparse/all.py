"Everything that a notebook needs, in one import"
from .granularity import *
from .criteria import *
from .method import *
from .schedule import *
from .report import *
from .plan import *
from .sparsifier import *
from .plot import *
from .callback import *
