"""cuDNN's attention beside flash attention: seconds, and errors by how the output's gradient is laid out.

python -m benchmarks.attention                # forward and backward of FLUX.2-klein 4B's, needs a GPU
python -m benchmarks.attention --unmended     # without rtdmd.distributed.attention, as torch is
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpus import device_seconds
from rtdmd.distributed.attention import mend_cudnn_backward

SIZES = BATCH, HEADS, LENGTH, WIDTH = 2, 4, 48, 64


def layouts(values: Tensor) -> dict[str, Tensor]:
    """The same [B, H, L, D]: as a part of wider rows, as rows, and one head after the other."""
    batch, heads, length, width = values.shape
    wider = torch.empty(batch, length, 3 * heads * width, device=values.device, dtype=values.dtype)
    part = wider[..., : heads * width].unflatten(-1, (heads, width)).transpose(1, 2)
    part.copy_(values)
    rows = values.transpose(1, 2).contiguous().transpose(1, 2)
    return {"part of wider rows": part, "rows": rows, "heads": values.contiguous()}


def draw(sizes: tuple[int, ...]) -> Tensor:
    return torch.randn(sizes, device="cuda", dtype=torch.bfloat16)


def errors() -> dict[str, list[float]]:
    """‖g − g64‖/‖g64‖ of the gradients at query, key and value, one layout after the other."""
    torch.manual_seed(0)
    inputs = [draw(SIZES).requires_grad_() for _ in range(3)]
    exact = [value.detach().double().requires_grad_() for value in inputs]
    gradient = draw(SIZES)
    expected = torch.autograd.grad(attend(exact), exact, gradient.double())
    found = {}
    for name, laid_out in layouts(gradient).items():
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            got = torch.autograd.grad(attend(inputs), inputs, laid_out)
        found[name] = [
            float((ours.double() - reference).norm() / reference.norm())
            for ours, reference in zip(got, expected, strict=True)
        ]
    return found


def milliseconds(run: Callable[[], object], repeats: int = 10) -> float:
    """Median, after three."""
    return 1e3 * median([device_seconds(run) for _ in range(3 + repeats)][3:])


def attend(inputs: Sequence[Tensor]) -> Tensor:
    query, key, value = inputs
    return functional.scaled_dot_product_attention(query, key, value)


def times(samples: int, heads: int, tokens: int, width: int) -> None:
    """Forward and backward of both, and what of the matrix units they use: 4·L²·D·H·B, and 2.5 times that."""
    inputs = [draw((samples, heads, tokens, width)).requires_grad_() for _ in range(3)]
    gradient = draw((samples, heads, tokens, width))
    flop = 4 * tokens**2 * width * heads * samples
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(backend):
            forward = milliseconds(lambda: attend(inputs))
            output = attend(inputs)
            backward = milliseconds(partial(torch.autograd.grad, output, inputs, gradient, retain_graph=True))
        rates = f"{flop / forward / 1e9:.0f} and {2.5 * flop / backward / 1e9:.0f} TFLOP/s"
        print(f"{backend.name}: forward {forward:.2f} ms, backward {backward:.2f} ms, {rates}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--unmended", action="store_true")
    parser.add_argument("--samples", type=int, default=27)
    parser.add_argument("--tokens", type=int, default=1536)
    options = parser.parse_args()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"
    )
    if not options.unmended:
        mend_cudnn_backward()
    for name, found in errors().items():
        print(f"gradient as {name}: " + ", ".join(f"{error:.1e}" for error in found))
    times(options.samples, 24, options.tokens, 128)


if __name__ == "__main__":
    main()
