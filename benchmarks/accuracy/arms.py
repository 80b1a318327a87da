"What is compared: for each name, a function from percent to the callbacks of a fit and a description of their settings"
from contextlib import redirect_stdout
from io import StringIO
from fastsparse.callback import SparsifyCallback

def _fasterai(percent, start=.2, end=1.): # its own agp goes from 0.2 to 1
    from fasterai.core.criteria import large_final
    from fasterai.core.schedule import Schedule, sched_agp
    from fasterai.sparse.sparsify_callback import SparsifyCallback as Peer
    class Quiet(Peer): # it prints during the fit
        def __call__(self, event_name):
            with redirect_stdout(StringIO()): return super().__call__(event_name)
    schedule = Schedule(sched_agp, start_pct=start, end_pct=end)
    return [Quiet(percent/100, 'weight', 'global', large_final, schedule)],f"SparsifyCallback({percent/100}, 'weight', 'global', large_final, Schedule(sched_agp, {start}, {end}))"

def _ours(percent):
    cb = SparsifyCallback(percent)
    return [cb],f'SparsifyCallback({percent}): {cb.schedule}'

ARMS = {
    'dense': lambda percent: ([], 'no callback'),
    'fastsparse': _ours,
    'fasterai': _fasterai,
    'fasterai tuned': lambda percent: _fasterai(percent, 0., .5),
}
