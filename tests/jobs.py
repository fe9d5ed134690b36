"""A small compression, and what its folders hold, for the tests of commands."""

import safetensors.torch
import torch


def small_job(model, images, output):
    """Flags of a small compression, with the quickest method that has settings of all kinds."""
    flags = f"--model local-dir:{model} --data-dir {images} --output {output} --iterations 4 --nsamples 16 --threads 1"
    return [*flags.split(), "--method", "oats"]


def without(job, *flags):
    """The job without some of its flags and their values."""
    return [word for pair in zip(job[::2], job[1::2], strict=True) if pair[0] not in flags for word in pair]


def weights(folder):
    return safetensors.torch.load_file(str(folder / "model.safetensors"))


def same(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
