"""What makes a model smaller: zeros, and then the tools that take them out"""
import torch
from torch import nn
from fastsparse.flow import flow

LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding)

def prune_coupled(model, x):
    "Half of the channels of each unit of coupled outputs become zero"
    from fastsparse import Sparsifier
    Sparsifier(model, 'coupled', 'local', example_input=x).prune_model(50)

def prune_filters(model, x):
    "Half of the filters of each layer become zero, each layer for itself"
    from fastsparse import Sparsifier
    Sparsifier(model, 'filter', 'local').prune_model(50)

MASKS = dict(coupled=prune_coupled, filter=prune_filters)


# -- what takes channels out: a function of a model, an example, and the layers that give the outputs, to the smaller model

def fastsparse(model, x, outputs):
    from fastsparse.compact import compact
    return compact(model, x).model

def output_layers(model, x):
    "The layers whose outputs are outputs of the model"
    f,axis = flow(model, x),lambda m: int(getattr(m, 'transposed', False) or isinstance(m, nn.Embedding))
    found = {n: (f'{n}.weight'.lstrip('.'), axis(m)) for n,m in model.named_modules() if isinstance(m, LAYERS)}
    return {n for n,at in found.items() if at in f.axes and f.outputs(*at).any()}

def zero_outputs(m):
    "For each channel that a layer gives, whether it is zero whatever the input; None if the layer is no reason to keep a channel"
    w,b = getattr(m, 'weight', None),getattr(m, 'bias', None)
    if isinstance(m, (nn.MultiheadAttention, nn.RNNBase)): return torch.zeros(10**6, dtype=torch.bool) # never told to
    if not isinstance(m, nn.Module) or isinstance(m, nn.PReLU) or w is None: return None
    if getattr(m, 'transposed', False) or isinstance(m, nn.Embedding): w = w.transpose(0, 1)
    zero = (w.detach() == 0).flatten(1).all(1) if w.dim() > 1 else w.detach() == 0
    return zero if b is None else zero & (b.detach() == 0)

def unfit(graph, group, outputs):
    "Channels of the first layer of a group that cannot go: an output, not zero in all coupled layers, or not as many in each group of a convolution"
    found = set()
    for item in group:
        m,pairs = item.dep.target.module,list(zip(item.idxs, item.root_idxs))
        gives = graph.is_out_channel_pruning_fn(item.dep.handler)
        if gives and m in outputs: return {r for _,r in pairs}
        zero = zero_outputs(m) if gives else None
        if zero is not None: found |= {r for i,r in pairs if i >= len(zero) or not zero[i]}
        if isinstance(m, nn.modules.conv._ConvNd) and 1 < m.groups < m.out_channels:
            size = (m.out_channels if gives else m.in_channels)//m.groups
            there = [i % size for i,r in pairs if r not in found]
            found |= {r for i,r in pairs if there.count(i % size) < m.groups}
    return found

def torch_pruning(model, x, outputs):
    "Its DependencyGraph removes what is zero in all layers of a group; groups that change outputs are skipped, as `get_all_groups` does it"
    import torch_pruning as tp
    graph = tp.DependencyGraph().build_dependency(model, x if isinstance(x, (tuple,dict)) else (x,), verbose=False)
    modules = dict(model.named_modules())
    outputs = {modules[n] for n in outputs}
    for layer in modules.values():
        if layer not in graph.module2node or not isinstance(layer, LAYERS): continue
        kinds = {nn.Linear: tp.prune_linear_out_channels, nn.Embedding: tp.prune_embedding_out_channels}
        prune = next((f for kind,f in kinds.items() if isinstance(layer, kind)), tp.prune_conv_out_channels)
        zero = zero_outputs(layer)
        idxs = zero.nonzero().flatten().tolist()[:len(zero)-1] # one stays
        while idxs:
            group = graph.get_pruning_group(layer, prune, idxs)
            if not (bad := unfit(graph, group, outputs)): break
            idxs = [i for i in idxs if i not in bad]
        if idxs and graph.check_pruning_group(group): group.prune()
    return model

ARMS = {'fastsparse': fastsparse, 'Torch-Pruning': torch_pruning}
