"""Writes adamw.safetensors: steps of bitsandbytes 0.50.2's AdamW8bit and of torch's AdamW, both on the CPU.

    pip install torch bitsandbytes==0.50.2 safetensors && python adamw.py
"""

import bitsandbytes as bnb
import torch
from bitsandbytes.backends.cpu import ops
from safetensors.torch import save_file


# The CPU library finds codes with a coarse table; the GPU kernels, and this, find the nearest.
def quantise(values, code, absmax, out, blocksize):
    for i in range(len(absmax)):
        block = slice(i * blocksize, (i + 1) * blocksize)
        absmax[i] = values[block].abs().max()
        scaled = values[block] * (1 / absmax[i].clamp(min=1e-38))
        out[block] = torch.bucketize(scaled, (code[:-1] + code[1:]) / 2).to(torch.uint8)


ops._quant_blockwise_fp32_direct = quantise

STEPS, COUNT = 4, 700  # the last block is short
SETTINGS = dict(lr=0.01, betas=(0.875, 0.9990234375), eps=1e-8, weight_decay=0.1)  # betas that are exact in f32

torch.manual_seed(1)
start = torch.randn(COUNT)
# Gradients of many sizes; a block of zeros in the first step.
grads = torch.randn(STEPS, COUNT) * 10 ** torch.linspace(-4, 1, COUNT)[torch.randperm(COUNT)]
grads[0, 256:512] = 0
out = {"start": start, "grads": grads}
for name, make in {
    "adamw": lambda p: torch.optim.AdamW([p], **SETTINGS),
    "adamw8bit": lambda p: bnb.optim.AdamW8bit([p], **SETTINGS, min_8bit_size=1),
}.items():
    p = torch.nn.Parameter(start.clone())
    optimiser = make(p)
    params = []
    for grad in grads:
        p.grad = grad.clone()
        optimiser.step()
        params.append(p.detach().clone())
    out[name] = torch.stack(params)
    state = optimiser.state[p]
    if name == "adamw8bit":
        out |= {"m": state["state1"], "m_max": state["absmax1"], "v": state["state2"], "v_max": state["absmax2"]}
        out |= {"m_map": state["qmap1"], "v_map": state["qmap2"]}
save_file(out, "adamw.safetensors")
