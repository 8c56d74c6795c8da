"""The optimizers that a step is compared with: ours, torch's, and other packages' where they are installed."""

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import largebatch

Params = Sequence[torch.nn.Parameter]
Make = Callable[[Params], Callable[[], object]]
UNIT = "torch AdamW fused"


@dataclass(frozen=True)
class Contender:
    """An optimizer to time.

    Attributes:
        name: for the table.
        make: parameters with gradients -> what takes one step of them. ImportError: its package is not there.
        bytes_per_parameter: that one step moves if nothing stays in cache; None where that is not known.
        slow_start: whether its first step compiles.
        by_name: whether to time it only where it is asked for.
    """

    name: str
    make: Make
    bytes_per_parameter: float | None = None
    slow_start: bool = False
    by_name: bool = False


def contenders(device: torch.device, compiled: bool) -> list[Contender]:
    """Return all, the unit first; ``compiled`` adds those whose first step takes a minute."""
    cuda = device.type == "cuda"
    fast = "triton" if cuda else "auto"

    def ours(cls: type[torch.optim.Optimizer], **settings: Any) -> Make:
        return lambda params: cls(params, lr=1e-4, **{"backend": fast, **settings}).step

    def torchs(cls: type[torch.optim.Optimizer], **settings: Any) -> Make:
        return lambda params: cls(params, lr=1e-4, **settings).step

    found = [
        Contender(UNIT, torchs(torch.optim.AdamW, fused=True), 28),
        Contender("largebatch LAMB", ours(largebatch.LAMB), 40),
        Contender("largebatch LAMB, bf16 state", ours(largebatch.LAMB, state_dtype=torch.bfloat16), 28),
        Contender("largebatch NN-LAMB", ours(largebatch.NNLAMB), 44),
        Contender("largebatch LARS", ours(largebatch.LARS), 28),
        Contender("largebatch LAMB, foreach", ours(largebatch.LAMB, backend="foreach")),
        Contender("torch AdamW foreach", torchs(torch.optim.AdamW, foreach=True)),
        Contender("timm Lamb", lambda params: module_of("timm.optim.lamb").Lamb(params, lr=1e-4).step),
        Contender(
            "timm Lamb, no clipping",
            lambda params: module_of("timm.optim.lamb").Lamb(params, lr=1e-4, max_grad_norm=None).step,
        ),
        Contender("torch_optimizer Lamb", lambda params: module_of("torch_optimizer.lamb").Lamb(params, lr=1e-4).step),
        Contender("pytorch_optimizer Lamb", lambda params: module_of("pytorch_optimizer").Lamb(params, lr=1e-4).step),
    ]
    if cuda:
        found += [
            Contender("largebatch LAMB, one launch", _in_one_launch(ours(largebatch.LAMB)), 28, by_name=True),
            Contender(
                "apex FusedLAMB", lambda params: module_of("apex.optimizers").FusedLAMB(params, lr=1e-4).step, 52
            ),
            Contender(
                "deepspeed FusedLamb",
                lambda params: module_of("deepspeed.ops.lamb").FusedLamb(params, lr=1e-4).step,
                40,
            ),
        ]
    else:
        found.append(Contender("optax lamb, jit", _optax, slow_start=True))
    if compiled:
        found.append(Contender("timm Lamb, no clipping, compiled", _compiled_timm, slow_start=True))
    return found


def _in_one_launch(make: Make) -> Make:
    def made(params: Params) -> Callable[[], object]:
        from largebatch.optim.triton import BACKEND

        step = make(params)

        def run() -> None:
            BACKEND.one_launch = True
            try:
                step()
            finally:
                BACKEND.one_launch = False

        return run

    return made


def _compiled_timm(params: Params) -> Callable[[], object]:
    optimizer = module_of("timm.optim.lamb").Lamb(params, lr=1e-4, max_grad_norm=None)
    return torch.compile(lambda: optimizer.step())


def _optax(params: Params) -> Callable[[], object]:
    jax, optax = module_of("jax"), module_of("optax")
    weights = [jax.numpy.asarray(x.detach().numpy()) for x in params]
    grads = [jax.numpy.asarray(x.grad.numpy()) for x in params if x.grad is not None]
    lamb = optax.lamb(1e-4, weight_decay=0.01)

    def update(grads: Any, state: Any, weights: Any) -> Any:
        updates, state = lamb.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state

    step = jax.jit(update, donate_argnums=(1, 2))
    held = [weights, lamb.init(weights)]

    def run() -> None:
        held[:] = step(grads, held[1], held[0])
        jax.block_until_ready(held)

    return run


def module_of(name: str) -> Any:
    """Import a peer; where its package wants others that its optimizer does not need, that module alone.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        package, *rest = name.split(".")
        found = importlib.util.find_spec(package)
        if not rest or found is None or not found.submodule_search_locations:
            raise
    for loaded in [key for key in sys.modules if key == package or key.startswith(package + ".")]:
        del sys.modules[loaded]
    path, parent = found.submodule_search_locations[0], package
    for part in [*rest[:-1], ""]:
        sys.modules[parent] = types.ModuleType(parent)
        sys.modules[parent].__path__ = [path]
        path, parent = f"{path}/{part}", f"{parent}.{part}"
    return importlib.import_module(name)


# ---- whose parameters ----


def shapes_of(model: str) -> list[tuple[int, ...]]:
    """Return the shapes of a model's parameters.

    Raises:
        ValueError: no model of this name.
    """
    if model in ("bert-mini", "bert-base", "bert-large"):
        from largebatch.models import BertConfig, BertForPreTraining

        with torch.device("meta"):
            return [tuple(x.shape) for x in BertForPreTraining(BertConfig.named(model[5:])).parameters()]
    if model == "resnet-50":
        return resnet50()
    if model == "2000x1000":
        return [(1000,)] * 2000
    raise ValueError(f"model {model!r}: expected one of {', '.join(MODELS)}")


MODELS = ("bert-mini", "bert-base", "bert-large", "resnet-50", "2000x1000")


def resnet50() -> list[tuple[int, ...]]:
    """Return the 161 shapes of ResNet-50 (He et al. 2016): convolutions, their batch norms, and the classifier."""

    def convolution(inputs: int, outputs: int, size: int) -> list[tuple[int, ...]]:
        return [(outputs, inputs, size, size), (outputs,), (outputs,)]

    shapes, inputs = convolution(3, 64, 7), 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += convolution(inputs, width, 1) + convolution(width, width, 3) + convolution(width, 4 * width, 1)
            if block == 0:
                shapes += convolution(inputs, 4 * width, 1)
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def parameters(shapes: Sequence[tuple[int, ...]], device: torch.device) -> list[torch.nn.Parameter]:
    """Make parameters of these shapes, with gradients."""
    made = []
    for shape in shapes:
        x = torch.nn.Parameter(0.02 * torch.randn(shape, device=device))
        x.grad = 1e-3 * torch.randn(shape, device=device)
        made.append(x)
    return made
