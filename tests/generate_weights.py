"""Writes tests/fixtures/weights: small weight files as PyTorch and safetensors write them, and
the values that torch reads back from them.

    python tests/generate_weights.py        (needs torch, numpy and safetensors)

The files are committed; run this again only to add one.
"""

import collections
import io
import json
import os
import pathlib
import zipfile

import safetensors.torch
import torch

OUT = pathlib.Path(__file__).parent / "fixtures" / "weights"


def layouts():
    """Every way a tensor can lie in its storage."""
    noise = torch.Generator("cpu").manual_seed(11)

    def randn(*shape):
        return torch.randn(*shape, generator=noise)

    shared = randn(40)
    conv = randn(3, 4, 2, 2)
    return collections.OrderedDict(
        contiguous=randn(2, 3, 4),
        channels_last=conv.to(memory_format=torch.channels_last),
        channels_last_f16=conv.half().to(memory_format=torch.channels_last),
        bf16=randn(3, 3).bfloat16(),
        f16=randn(5).half(),
        i64=torch.tensor([[1, -2, 3], [2**40, -(2**40), 0]]),
        offset_view=shared[7:31].reshape(4, 6),
        overlapping_view=shared[10:22].reshape(3, 4),
        strided_view=shared[1::3],
        transposed=randn(4, 3).t(),
        permuted_offset=randn(2, 3, 4).permute(2, 0, 1)[1:, :, 1:],
        expanded=randn(3, 1).expand(3, 4),
        scalar=torch.tensor(2.5),
        empty=torch.zeros(0, 3),
        same_a=shared,
        same_b=shared,
    )


def described(tensors):
    return {
        name: {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "stride": list(tensor.stride()),
            "values": tensor.to(torch.float64).flatten().tolist(),
        }
        for name, tensor in tensors.items()
    }


class Malicious:
    def __reduce__(self):
        return os.system, ("touch /tmp/a-pickle-ran-this",)


def rewritten(source, change=None, **options):
    """The same archive with some entries' bytes changed, as Python's zipfile writes it."""
    out = io.BytesIO()
    with zipfile.ZipFile(OUT / source) as old, zipfile.ZipFile(out, "w", **options) as new:
        for entry in old.infolist():
            data = old.read(entry)
            new.writestr(entry.filename, change(entry.filename, data) if change else data)
    return out.getvalue()


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    torch.save(layouts(), OUT / "layouts.bin")
    loaded = torch.load(OUT / "layouts.bin", weights_only=True)
    assert not loaded["channels_last"].is_contiguous()
    expected = {"layouts.bin": described(loaded)}

    torch.manual_seed(12)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.GroupNorm(2, 4), torch.nn.Linear(4, 2, bias=False)
    ).to(memory_format=torch.channels_last)
    torch.save(module.half().state_dict(), OUT / "module.bin")
    expected["module.bin"] = described(torch.load(OUT / "module.bin", weights_only=True))

    one = {"weight": torch.arange(6.0).reshape(2, 3)}
    torch.save(one, OUT / "dict.bin")
    expected["dict.bin"] = described(one)
    torch.save(one, OUT / "old_format.bin", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": one, "epoch": 3, "betas": [0.9, 0.999]}, OUT / "nested.bin")
    torch.save({"weight": one["weight"].double()}, OUT / "double.bin")
    torch.save({"weight": torch.nn.Parameter(one["weight"])}, OUT / "parameter.bin")
    torch.save({"weight": one["weight"], "extra": Malicious()}, OUT / "malicious.bin")
    torch.save(one, OUT / "protocol_4.bin", pickle_protocol=4)
    (OUT / "compressed.bin").write_bytes(
        rewritten("dict.bin", compression=zipfile.ZIP_DEFLATED)
    )

    def big(name, data):
        return b"big" if name.endswith("/byteorder") else data

    (OUT / "big_endian.bin").write_bytes(rewritten("dict.bin", big))

    def cut(name, data):
        return data[:-4] if name.endswith("/data/0") else data

    (OUT / "short_storage.bin").write_bytes(rewritten("dict.bin", cut))

    dense = {name: tensor.clone().contiguous() for name, tensor in layouts().items()}
    safetensors.torch.save_file(dense, OUT / "dense.safetensors", {"format": "pt"})
    expected["dense.safetensors"] = described(dense)
    safetensors.torch.save_file(
        {"weight": one["weight"].double()}, OUT / "double.safetensors"
    )
    text = json.dumps(expected, sort_keys=True)
    (OUT / "expected.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
