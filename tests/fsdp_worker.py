"""Trains a tiny model with the sparse objective, sharded by FSDP2 if started by torchrun. Prints figures as JSON.

accelerate does not shard on CPUs, so the sharding is torch's own fully_shard, over gloo, as accelerate applies it on
GPUs: each decoder layer, then the model.

    python fsdp_worker.py MODEL        torchrun --nproc-per-node 2 fsdp_worker.py MODEL
"""

import json
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from prosparse_pipe.objective import ActivationPenalty, token_loss
from prosparse_pipe.relu import substitute_relu

GLOBAL_BATCH = 4


def main() -> None:
    torch.set_num_threads(1)
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).train()
    teacher = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
    ffns = substitute_relu(model)
    if world > 1:
        mesh = init_device_mesh("cpu", (world,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    penalty = ActivationPenalty(ffns)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    figures = []
    for step in range(4):
        ids = torch.randint(3, 300, (GLOBAL_BATCH, 24), generator=generator)
        ids = ids[rank * GLOBAL_BATCH // world : (rank + 1) * GLOBAL_BATCH // world]
        with penalty.collect():
            logits = model(input_ids=ids, use_cache=False).logits
        l1, rates = penalty.take()
        with torch.no_grad():
            teacher_logits = teacher(input_ids=ids, use_cache=False).logits
        loss, ce, kl = token_loss(logits, teacher_logits, ids, 1.0, 0.5)
        (loss + step * l1).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        optimizer.step()
        optimizer.zero_grad()
        means = torch.stack([ce, kl, l1.detach(), rates.mean()])
        if world > 1:
            dist.all_reduce(means)
            means /= world
        figures.append([*means.tolist(), norm.item()])
    if rank == 0:
        sharded = sum(type(p).__name__ == "DTensor" or hasattr(p, "full_tensor") for p in model.parameters())
        print(json.dumps({"figures": figures, "sharded": sharded}))
    if world > 1:
        dist.destroy_process_group()


main()
