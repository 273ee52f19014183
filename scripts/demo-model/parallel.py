"""Where and how training runs: on a GPU, or on the CPU in processes of one thread each.

Small convolutions leave most of a second thread idle, so two processes that share their gradients
train about twice as fast as one process of two threads.
"""

import os

import torch
import torch.distributed as distributed
import torch.multiprocessing as multiprocessing

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROCESSES = 1 if DEVICE.type == "cuda" else 2
PORT = os.environ.get("DEMO_MODEL_PORT", "29511")


def spawn(work, processes, *arguments):
    """Runs `work(rank, processes, *arguments)` in every process, and waits for all of them."""
    multiprocessing.spawn(_start, args=(work, processes, arguments), nprocs=processes)


def _start(rank, work, processes, arguments):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=PORT)
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=processes)
    work(rank, processes, *arguments)
    distributed.destroy_process_group()


class Gradients:
    """The gradients of all parameters as one vector, so that sharing them is one message."""

    def __init__(self, parameters):
        self.parameters = list(parameters)
        total = sum(p.numel() for p in self.parameters)
        self.vector = torch.zeros(total, device=self.parameters[0].device)
        start = 0
        for p in self.parameters:
            view = self.vector[start : start + p.numel()].view_as(p)
            p.grad = view
            start += p.numel()

    def zero(self):
        self.vector.zero_()

    def share(self, max_norm):
        """Means over the processes, then clipped to `max_norm`; gives the norm before that."""
        if distributed.get_world_size() > 1:
            distributed.all_reduce(self.vector)
            self.vector /= distributed.get_world_size()
        norm = self.vector.norm()
        if norm > max_norm:
            self.vector *= max_norm / norm
        return norm.item()


class Average:
    """The exponential moving average of parameters, which is what is kept in the end."""

    def __init__(self, parameters, decay):
        self.parameters, self.decay = list(parameters), decay
        self.mean = [p.detach().clone() for p in self.parameters]

    def update(self, step):
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.mean, [p.data for p in self.parameters], 1 - decay)

    def swap(self):
        """Exchanges the parameters and their averages: call it again to go on training."""
        for p, mean in zip(self.parameters, self.mean):
            kept = p.data.clone()
            p.data.copy_(mean)
            mean.copy_(kept)


def save(path, content):
    """Writes whole or not at all, so that a training that is killed can go on."""
    torch.save(content, f"{path}.part")
    os.replace(f"{path}.part", path)
