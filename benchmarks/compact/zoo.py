"""Models of torchvision and fastai, untrained, in which no parameter is left at a round number"""
from functools import partial
import torch
from torch import nn

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)

@torch.no_grad()
def stir(model):
    "Fill what starts at 0, at 1 or nearly at 0, so that every parameter makes a difference to the outputs"
    norms = {id(p): k for m in model.modules() if isinstance(m, NORMS) for k,p in m.named_parameters(recurse=False)}
    for name,p in model.named_parameters():
        if id(p) in norms: p.uniform_(*(.5, 1.5) if norms[id(p)] == 'weight' else (-.5, .5))
        elif 'layer_scale' in name: p.uniform_(.2, .6)
        elif not p.any(): p.uniform_(-.1, .1)
    return model.eval()

@torch.no_grad()
def settle(model, x):
    "Running statistics as after training, but not exactly those of `x`: with any others a deep model gives the same for every input"
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.running_mean is not None]
    momenta = [m.momentum for m in norms]
    for m in norms: m.train(); m.momentum = 1.
    model(x)
    for m,momentum in zip(norms, momenta):
        m.momentum = momentum
        m.running_mean += m.running_var.sqrt()*torch.empty_like(m.running_mean).uniform_(-.2, .2)
        m.running_var *= torch.empty_like(m.running_var).uniform_(.8, 1.25)
    return model.eval()

def _torchvision(name, size, **settings):
    import torchvision
    return getattr(torchvision.models, name)(weights=None, **settings)

def _segmentation(name, size):
    from torchvision.models import segmentation
    return getattr(segmentation, name)(weights=None, weights_backbone=None, **{} if 'lraspp' in name else {'aux_loss': None})

def _xresnet(name, size):
    import fastai.vision.all as fv
    return getattr(fv, name)(pretrained=False, n_out=1000)

def _vision_learner(size):
    import torchvision
    from fastai.vision.learner import create_vision_model
    return create_vision_model(torchvision.models.resnet18, 10, pretrained=False)

def _unet(size):
    import torchvision
    from fastai.vision.learner import create_body
    from fastai.vision.models.unet import DynamicUnet
    return DynamicUnet(create_body(torchvision.models.resnet18(weights=None), n_in=3, pretrained=False), 10, (size, size))

_names = '''resnet18 resnet50 vgg16_bn alexnet squeezenet1_0 densenet121 mobilenet_v2 mobilenet_v3_large mnasnet1_0 efficientnet_b0 regnet_x_400mf
    resnext50_32x4d shufflenet_v2_x1_0 convnext_tiny vit_b_16 swin_t'''.split()
MODELS = {n: partial(_torchvision, n) for n in _names} # name to a function of the size of the images
MODELS |= {n: partial(_torchvision, n, aux_logits=False, init_weights=False) for n in ('googlenet','inception_v3')}
MODELS |= {n: partial(_segmentation, n) for n in ('fcn_resnet50','deeplabv3_mobilenet_v3_large','lraspp_mobilenet_v3_large')}
MODELS |= {n: partial(_xresnet, n) for n in ('xresnet18','xresnet50','xse_resnet18')}
MODELS |= {'vision_learner resnet18': _vision_learner, 'DynamicUnet resnet18': _unet}
SIZES = {'inception_v3': 299} # 224 elsewhere

def images(n, size):
    "Random ones with a colour and large shapes: of noise alone a mean over all places leaves nothing"
    shapes = nn.functional.interpolate(torch.randn(n, 3, 4, 4), size=(size, size), mode='bilinear')
    return torch.randn(n, 3, 1, 1) + shapes + torch.randn(n, 3, size, size)

def build(name, size):
    "The same model in every process"
    torch.manual_seed(0)
    return settle(stir(MODELS[name](size)), images(4, size))


class Block(nn.Module):
    "Of a decoder: attention to what came before, and an MLP"
    def __init__(self, width, heads):
        super().__init__()
        self.heads,self.norm1,self.norm2 = heads,nn.LayerNorm(width),nn.LayerNorm(width)
        self.q,self.k,self.v,self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up,self.down = nn.Linear(width, 4*width, bias=False),nn.Linear(4*width, width, bias=False)
    def forward(self, x):
        q,k,v = (f(self.norm1(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))

def decoder(weights, width=2048, words=1000):
    "About that many weights, in bfloat16 without a float32 copy on the way"
    with torch.device('meta'):
        blocks = [Block(width, width//64) for _ in range(max(round(weights/(12*width**2)), 1))]
        model = nn.Sequential(nn.Embedding(words, width), *blocks, nn.LayerNorm(width), nn.Linear(width, words, bias=False)).bfloat16()
    model.to_empty(device='cpu')
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters(): p.normal_(0, .02) if p.dim() > 1 else p.uniform_(.5, 1.5)
    return model.eval()
