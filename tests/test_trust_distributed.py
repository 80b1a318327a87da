"Two processes on one machine agree"
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fastcore.foundation import L

from fastai_helpers import is_exact, net

pytest.importorskip('accelerate', reason='needs the extra `distributed`')


@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    folder, here = tmp_path_factory.mktemp('ranks'), Path(__file__).parent
    env = {**os.environ, 'ACCELERATE_USE_CPU': 'true', 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', 'PYTHONPATH': os.pathsep.join([str(here), os.environ.get('PYTHONPATH', '')]).rstrip(os.pathsep)}
    command = [sys.executable, '-W', 'ignore', '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', str(here/'distributed_fit.py'), str(folder)]
    out = subprocess.run(command, env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-4000:]
    return folder, [json.loads((folder/f'rank{r}.json').read_text()) for r in (0, 1)]


CASES = ['large_final', 'random_score', 'movement', 'updating_movmag', 'taylor', 'wanda', 'filters', 'tickets', 'channels_last', 'coupled', 'rigl', 'set']


@pytest.mark.parametrize('name', CASES)
def test_masks_and_weights_are_the_same_on_both_ranks(ranks, name):
    one, two = (r[name] for r in ranks[1])
    assert one['masks'] == two['masks'] and one['weights'] == two['weights'] and one['steps'] == two['steps']
    assert one['evidence'] == two['evidence'], 'each rank has its own batches'


@pytest.mark.parametrize('name', CASES)
def test_the_target_is_exact_on_both_ranks(ranks, name):
    for r in ranks[1]:
        got = r[name]
        if name == 'coupled': assert got['current'] > 10
        elif name != 'filters': assert abs(got['percent'] - 80) < .1 and got['percent'] == got['current']
        else: assert abs(got['current'] - 80) < 6
        assert got['regrown'] == 0 and got['state'] == 0


def test_the_model_comes_out_unwrapped_and_plain(ranks):
    for r in ranks[1]:
        for got in r.values(): assert got['keys'] == list(net().state_dict()) and got['kind'] == 'Sequential'


def test_the_checkpoint_of_rank_0_is_sparse_and_plain(ranks):
    with torch.serialization.safe_globals([L]): saved = torch.load(ranks[0]/'models'/'sparse.pth', weights_only=True)['model'] # `L` is fastai's
    model = net()
    assert list(saved) == list(model.state_dict())
    model.load_state_dict(saved)
    assert is_exact(model, 80)


def test_tickets_are_whole_files(ranks):
    files = sorted((ranks[0]/'tickets').iterdir())
    assert len(files) == 3
    for f in files: net().load_state_dict(torch.load(f, weights_only=True))
